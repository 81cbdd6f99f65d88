//! The effective settings without secrets, for operators and for fingerprints.

use std::collections::BTreeMap;

use toml::{Table, Value};
use uuid::Uuid;

use crate::config::keys::{DESTINATIONS, SECRETS, URLS, is_rule, leaf_mut, split_process};
use crate::text::masked_urls;

/// The effective settings with masked secrets. For destinations, only what differs from the shared settings.
pub(super) fn effective(shared: Table, destinations: BTreeMap<String, Table>) -> Table {
    let own = |(name, settings): (String, Table)| (name, Value::Table(mask(difference(settings, &shared))));
    let destinations: Table = destinations.into_iter().map(own).collect();
    let mut all = mask(shared.clone());
    if !destinations.is_empty() {
        all.insert(DESTINATIONS.into(), Value::Table(destinations));
    }
    all
}

/// The values of `table` that differ from `base`.
fn difference(table: Table, base: &Table) -> Table {
    let differs = |(key, value): (String, Value)| match (value, base.get(&key)) {
        (value, Some(same)) if value == *same => None,
        (Value::Table(inner), Some(Value::Table(base))) if !is_rule(&inner) => {
            Some((key, Value::Table(difference(inner, base))))
        }
        (value, _) => Some((key, value)),
    };
    table.into_iter().filter_map(differs).collect()
}

fn mask(mut settings: Table) -> Table {
    for path in SECRETS {
        match leaf_mut(&mut settings, path) {
            Some(Value::String(secret)) if !secret.is_empty() && !URLS.contains(&path) => {
                *secret = "***".into();
            }
            Some(_) | None => {}
        }
    }
    for path in URLS {
        if let Some(Value::String(url)) = leaf_mut(&mut settings, path)
            && !url.is_empty()
        {
            *url = masked_urls(url);
        }
    }
    settings
}

/// A short fingerprint of a destination's settings. Secrets have no part in it, because it could be used to guess them.
pub(super) fn hash(settings: &Table) -> String {
    let (_, settings) = split_process(mask(settings.clone()));
    let text = toml::to_string(&settings).unwrap_or_default();
    let mut hash = Uuid::new_v5(&Uuid::nil(), text.as_bytes()).simple().to_string();
    hash.truncate(12);
    hash
}
