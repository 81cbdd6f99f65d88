//! The part of the settings that says where values come from.

use std::collections::BTreeMap;

use strum::VariantArray;
use toml::{Table, Value};

use crate::config::Reader;
use crate::config::layers::{Problem, join, leaf};
use crate::domain::mapping::source::{Alternative, Normalize, Source};
use crate::domain::mapping::{Anonymous, FreeMail, RecordRules, Rule, Rules, Trigger, WriteRule};
use crate::domain::record::{Channel, Field};
use crate::domain::schema::FieldRef;

/// The keys of a mapping rule.
const RULE: [&str; 5] = ["from", "or_on_create", "write", "normalize", "values"];
/// Those that say when a value is written, which is no question for an id records are found by.
const WRITING: [&str; 2] = ["or_on_create", "write"];

impl Reader<'_> {
    pub(super) fn mapping(&mut self) -> Option<Rules> {
        let trigger = self.text("mapping.trigger");
        let trigger = Trigger::parse(&trigger).map_err(|message| self.problem("mapping.trigger", &message));
        let anonymous = self.parsed("mapping.anonymous", "one of `dead_letter`, `skip`", |text| match text {
            "dead_letter" => Some(Anonymous::DeadLetter),
            "skip" => Some(Anonymous::Skip),
            _ => None,
        });
        let free_mail: Option<Vec<String>> = leaf(self.settings, "mapping.free_mail_domains")
            .and_then(Value::as_array)
            .and_then(|list| list.iter().map(|item| item.as_str().map(str::to_lowercase)).collect());
        if free_mail.is_none() {
            self.problem(
                "mapping.free_mail_domains",
                "must be a list of domains like `[\"gmail.com\", \"yahoo.*\"]`",
            );
        }
        for domain in free_mail.iter().flatten() {
            let name = domain.strip_suffix(".*").unwrap_or(domain);
            let fits =
                !name.is_empty() && !name.contains(['@', '*', ' ']) && (name != domain || name.contains('.'));
            if !fits {
                let message = format!(
                    "\"{domain}\" matches no domain: write `gmail.com`, or `yahoo.*` for every yahoo"
                );
                self.problem("mapping.free_mail_domains", &message);
            }
        }
        let lead = RecordRules {
            fields: self.rules(
                "mapping.lead",
                &[("name", Field::Name), ("description", Field::Description), ("status_id", Field::Status)],
            ),
            custom: self.custom_rules("mapping.lead.custom"),
            key: self.field("close.lead_company_id_field"),
            id: self.id_source("mapping.company_id"),
            synced_at: self.field("close.lead_synced_at_field"),
        };
        let contact = RecordRules {
            fields: self.rules("mapping.contact", &[("name", Field::Name), ("title", Field::Title)]),
            custom: self.custom_rules("mapping.contact.custom"),
            key: self.field("close.contact_user_id_field"),
            id: self.id_source("mapping.user_id"),
            synced_at: self.field("close.contact_synced_at_field"),
        };
        let channels = self.rules(
            "mapping.contact",
            &[("email", Channel::Email), ("phone", Channel::Phone), ("url", Channel::Url)],
        );
        for (path, rules) in [("mapping.lead.custom", &lead), ("mapping.contact.custom", &contact)] {
            if let Some(key) = &rules.key
                && rules.custom.contains_key(key)
            {
                let message = "is a lookup field, filled from `mapping.company_id` or `mapping.user_id`: remove it here";
                self.problem(&join(path, key.as_str()), message);
            }
        }
        let free_mail = FreeMail(free_mail?);
        Some(Rules { trigger: trigger.ok()?, anonymous: anonymous?, lead, contact, channels, free_mail })
    }

    fn rules<T: Ord + Clone>(&mut self, path: &str, fields: &[(&str, T)]) -> BTreeMap<T, Rule> {
        let rule = |(key, field): &(&str, T)| Some((field.clone(), self.rule(&join(path, key))?));
        fields.iter().filter_map(rule).collect()
    }

    fn custom_rules(&mut self, path: &str) -> BTreeMap<FieldRef, Rule> {
        let table = leaf(self.settings, path).and_then(Value::as_table).cloned().unwrap_or_default();
        let mut rules = BTreeMap::new();
        for name in table.keys() {
            let key = join(path, name);
            match field_ref(name) {
                Some(field) => rules.extend(self.rule(&key).map(|rule| (field, rule))),
                None => self.problem(&key, NO_FIELD),
            }
        }
        rules
    }

    fn rule(&mut self, path: &str) -> Option<Rule> {
        let source = self.source(path, "from", &RULE)?;
        let has_more = leaf(self.settings, &join(path, "or_on_create")).is_some();
        let or_on_create =
            if has_more { self.source(path, "or_on_create", &RULE)? } else { Source::default() };
        let write = match leaf(self.settings, &join(path, "write")).map(|value| value.clone().try_into()) {
            None => WriteRule::default(),
            Some(Ok(write)) => write,
            Some(Err(_)) => {
                self.problem(&join(path, "write"), "must be one of `always`, `if_empty`, `on_create`");
                return None;
            }
        };
        Some(Rule { source, write, or_on_create })
    }

    /// Where an id comes from. It is always written: the record is found by it.
    fn id_source(&mut self, path: &str) -> Source {
        let known: Vec<&str> = RULE.into_iter().filter(|key| !WRITING.contains(key)).collect();
        self.source(path, "from", &known).unwrap_or_default()
    }

    /// The alternatives a rule has under `key`, with what it does to values.
    fn source(&mut self, path: &str, key: &str, known: &[&str]) -> Option<Source> {
        let rule = leaf(self.settings, path).and_then(Value::as_table);
        for key in rule.into_iter().flat_map(Table::keys) {
            if !known.contains(&key.as_str()) {
                self.problems.push(Problem {
                    key: join(path, key),
                    message: format!("is no setting (known here: {})", known.join(", ")),
                });
            }
        }
        let from = join(path, key);
        let Some(alternatives) = rule.and_then(|rule| rule.get(key)).and_then(Value::as_array) else {
            self.problem(path, &format!("must be a table like `{{ {key} = [\"$.traits.title\"] }}`"));
            return None;
        };
        let alternatives: Vec<_> = alternatives
            .iter()
            .filter_map(|item| alternative(item).map_err(|message| self.problem(&from, &message)).ok())
            .collect();

        let key = join(path, "normalize");
        let normalize = rule.and_then(|rule| rule.get("normalize"));
        let normalize = normalize.map_or(Some(Vec::new()), |list| {
            let word = |item: &Value| item.as_str()?.parse::<Normalize>().ok();
            list.as_array()?.iter().map(word).collect()
        });
        if normalize.is_none() {
            let words = Normalize::VARIANTS
                .iter()
                .map(|word| format!("`{}`", word.label()))
                .collect::<Vec<_>>()
                .join(", ");
            self.problem(&key, &format!("must be a list of {words}"));
        }
        let values = rule.and_then(|rule| rule.get("values"));
        let values = values.map_or(Some(BTreeMap::new()), |table| {
            table.as_table()?.iter().map(|(from, to)| Some((from.clone(), scalar(to)?))).collect()
        });
        if values.is_none() {
            self.problem(&join(path, "values"), "must be a table like `{ true = \"Yes\", false = \"No\" }`");
        }
        Some(Source::new(alternatives).normalized(normalize?).translated(values?))
    }

    fn field(&mut self, path: &str) -> Option<FieldRef> {
        let text = self.text(path);
        if text.is_empty() {
            return None;
        }
        let field = field_ref(&text);
        if field.is_none() {
            self.problem(path, &format!("\"{text}\" {NO_FIELD}"));
        }
        field
    }
}

const NO_FIELD: &str = "must be the id of a custom field, `cf_...`, or its name, without `custom.`";

/// The id or name of a custom field.
fn field_ref(text: &str) -> Option<FieldRef> {
    let text = text.trim();
    (!text.is_empty() && !text.starts_with("custom.")).then(|| FieldRef::new(text))
}

/// One item of `from`.
fn alternative(item: &Value) -> Result<Alternative, String> {
    let constant = |table: &Table| scalar(table.get("value").filter(|_| table.len() == 1)?);
    match item {
        Value::String(text) => Alternative::parse(text),
        Value::Table(table) if constant(table).is_some() => {
            Ok(Alternative::constant(constant(table).unwrap_or_default()))
        }
        Value::Array(_) => {
            Err("has a list in its list: several values are joined by a template like `\"{$.traits.a} {$.traits.b}\"`".into())
        }
        Value::Table(_) | Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => {
            Err("must be a list of JSONPaths, templates, or constants like `{ value = \"Customer\" }`".into())
        }
    }
}

/// A single value, in JSON.
fn scalar(value: &Value) -> Option<serde_json::Value> {
    match value {
        Value::String(text) => Some(text.as_str().into()),
        Value::Integer(number) => Some((*number).into()),
        Value::Float(number) => serde_json::Number::from_f64(*number).map(Into::into),
        Value::Boolean(flag) => Some((*flag).into()),
        Value::Datetime(moment) => Some(moment.to_string().into()),
        Value::Array(_) | Value::Table(_) => None,
    }
}
