//! The mapping: which events are for Close, and where values come from.

use std::collections::BTreeMap;

use strum::VariantArray;
use toml::{Table, Value};

use crate::config::problems::Problem;
use crate::config::raw::{self, Setting, setting};
use crate::config::reader::Reader;
use crate::domain::mapping::source::{Alternative, Normalize, Source};
use crate::domain::mapping::{
    Anonymous, FreeMail, Placeholders, RecordRules, Rule, Rules, Trigger, WriteRule,
};
use crate::domain::record::{Channel, Field};
use crate::domain::schema::FieldRef;

/// The keys of a mapping rule.
const RULE: [&str; 5] = ["from", "or_on_create", "write", "normalize", "values"];
/// The keys of an id's rule. An id has no write rule, because records are found by it.
const ID_RULE: [&str; 3] = ["from", "normalize", "values"];

pub(super) fn read(raw: &raw::Destination, reader: &mut Reader<'_>) -> Option<Rules> {
    let trigger = setting!(raw, mapping.trigger);
    let trigger = Trigger::parse(trigger.text()).map_err(|message| reader.problem(trigger.key, message));
    let anonymous = reader.parsed(
        setting!(raw, mapping.anonymous),
        "action",
        "`dead_letter` or `skip`",
        |text| match text {
            "dead_letter" => Some(Anonymous::DeadLetter),
            "skip" => Some(Anonymous::Skip),
            _ => None,
        },
    );
    let free_mail = free_mail(raw, reader);
    let placeholders = reader.words(&setting!(raw, mapping.placeholders)).map(Placeholders::of_ids);
    let placeholder_values =
        reader.words(&setting!(raw, mapping.placeholder_values)).map(Placeholders::of_values);
    let lead = RecordRules {
        fields: reader.rules([
            (Field::Name, setting!(raw, mapping.lead.name)),
            (Field::Description, setting!(raw, mapping.lead.description)),
            (Field::Status, setting!(raw, mapping.lead.status_id)),
        ]),
        custom: reader.custom_rules(&setting!(raw, mapping.lead.custom)),
        key: reader.field(setting!(raw, close.lead_company_id_field)),
        id: reader.id_source(&setting!(raw, mapping.company_id)),
        synced_at: reader.field(setting!(raw, close.lead_synced_at_field)),
    };
    let contact = RecordRules {
        fields: reader.rules([
            (Field::Name, setting!(raw, mapping.contact.name)),
            (Field::Title, setting!(raw, mapping.contact.title)),
        ]),
        custom: reader.custom_rules(&setting!(raw, mapping.contact.custom)),
        key: reader.field(setting!(raw, close.contact_user_id_field)),
        id: reader.id_source(&setting!(raw, mapping.user_id)),
        synced_at: reader.field(setting!(raw, close.contact_synced_at_field)),
    };
    for (table, rules) in [("lead", &lead.fields), ("contact", &contact.fields)] {
        for field in rules.iter().filter(|(_, rule)| rule.write == WriteRule::Add).map(|(field, _)| field) {
            let message = "`add` is for custom fields with several values; this field holds one value";
            reader.problem(format!("mapping.{table}.{field}.write"), message);
        }
    }
    let channels = reader.rules([
        (Channel::Email, setting!(raw, mapping.contact.email)),
        (Channel::Phone, setting!(raw, mapping.contact.phone)),
        (Channel::Url, setting!(raw, mapping.contact.url)),
    ]);
    let customs = [setting!(raw, mapping.lead.custom), setting!(raw, mapping.contact.custom)];
    for (custom, rules) in customs.into_iter().zip([&lead, &contact]) {
        if let Some(key) = &rules.key
            && rules.custom.contains_key(key)
        {
            let message =
                "is a lookup field, filled from `mapping.company_id` or `mapping.user_id`; remove it here";
            reader.problem(format!("{}.{}", custom.key, key.as_str()), message);
        }
    }
    let rules = Rules {
        trigger: trigger.ok()?,
        anonymous: anonymous?,
        lead,
        contact,
        channels,
        free_mail: free_mail?,
    };
    Some(rules.with_placeholders(&placeholders?, &placeholder_values?))
}

fn free_mail(raw: &raw::Destination, reader: &mut Reader<'_>) -> Option<FreeMail> {
    let setting = setting!(raw, mapping.free_mail_domains);
    let domains: Option<Vec<String>> =
        setting.value.iter().map(|item| item.as_str().map(str::to_lowercase)).collect();
    let Some(domains) = domains else {
        reader.problem(setting.key, "must be a list of domains like `[\"gmail.com\", \"yahoo.*\"]`");
        return None;
    };
    for domain in &domains {
        let name = domain.strip_suffix(".*").unwrap_or(domain);
        let fits =
            !name.is_empty() && !name.contains(['@', '*', ' ']) && (name != domain || name.contains('.'));
        if !fits {
            let message = format!(
                "\"{domain}\" is not a valid domain; expected one like `gmail.com`, or `yahoo.*` for every yahoo"
            );
            reader.problem(setting.key.as_str(), message);
        }
    }
    Some(FreeMail(domains))
}

impl Reader<'_> {
    /// A list of words.
    fn words(&mut self, setting: &Setting<'_, Vec<Value>>) -> Option<Vec<String>> {
        let word = |item: &Value| Some(item.as_str()?.trim().to_owned()).filter(|word| !word.is_empty());
        let words: Option<Vec<_>> = setting.value.iter().map(word).collect();
        if words.is_none() {
            self.problem(setting.key.as_str(), "must be a list of words like `[\"undefined\", \"null\"]`");
        }
        words
    }

    fn rules<T: Ord, const N: usize>(
        &mut self,
        fields: [(T, Setting<'_, raw::Rule>); N],
    ) -> BTreeMap<T, Rule> {
        fields.into_iter().filter_map(|(field, rule)| Some((field, self.rule(&rule)?))).collect()
    }

    fn custom_rules(&mut self, custom: &Setting<'_, BTreeMap<String, Value>>) -> BTreeMap<FieldRef, Rule> {
        let mut rules = BTreeMap::new();
        for (name, value) in custom.value {
            let key = format!("{}.{name}", custom.key);
            let Some(field) = field_ref(name) else {
                self.problem(key, NOT_A_FIELD);
                continue;
            };
            match value.clone().try_into::<raw::Rule>() {
                Ok(rule) => {
                    let rule = self.rule(&Setting { key, value: &rule });
                    rules.extend(rule.map(|rule| (field, rule)));
                }
                Err(_) => self.problem(key, not_a_rule("from")),
            }
        }
        rules
    }

    fn rule(&mut self, rule: &Setting<'_, raw::Rule>) -> Option<Rule> {
        self.unknown_keys(rule, &RULE);
        let source = self.source(rule, &setting!(rule => from));
        let or_on_create = setting!(rule => or_on_create);
        let or_on_create = match or_on_create.value {
            None => Some(Source::default()),
            Some(_) => self.source(rule, &or_on_create),
        };
        let write = setting!(rule => write);
        let write = match write.value.clone().map(Value::try_into::<WriteRule>) {
            None => Some(WriteRule::default()),
            Some(Ok(write)) => Some(write),
            Some(Err(_)) => {
                self.problem(write.key, "must be one of `always`, `if_empty`, `on_create`, `add`");
                None
            }
        };
        Some(Rule { source: source?, write: write?, or_on_create: or_on_create? })
    }

    /// Where an id comes from. It is always written, because the record is found by it.
    fn id_source(&mut self, rule: &Setting<'_, raw::Rule>) -> Source {
        self.unknown_keys(rule, &ID_RULE);
        self.source(rule, &setting!(rule => from)).unwrap_or_default()
    }

    /// Reports the keys of a rule that are not `known`.
    fn unknown_keys(&mut self, rule: &Setting<'_, raw::Rule>, known: &[&str]) {
        let raw::Rule { or_on_create, write, unknown, .. } = rule.value;
        let write_keys = [("or_on_create", or_on_create), ("write", write)];
        let write_keys = write_keys.into_iter().filter(|(_, value)| value.is_some()).map(|(key, _)| key);
        for key in unknown.keys().map(String::as_str).chain(write_keys.filter(|key| !known.contains(key))) {
            self.problems.push(Problem::unknown(format!("{}.{key}", rule.key), known.iter().copied()));
        }
    }

    /// The alternatives of a rule's `from` or `or_on_create`, with what the rule does to their values.
    fn source(
        &mut self,
        rule: &Setting<'_, raw::Rule>,
        alternatives: &Setting<'_, Option<Value>>,
    ) -> Option<Source> {
        let Some(list) = alternatives.value.as_ref().and_then(Value::as_array) else {
            let name = alternatives.key.rsplit('.').next().unwrap_or_default();
            self.problem(rule.key.as_str(), not_a_rule(name));
            return None;
        };
        let list: Vec<_> = list
            .iter()
            .filter_map(|item| {
                alternative(item).map_err(|message| self.problem(alternatives.key.as_str(), message)).ok()
            })
            .collect();

        let normalize = setting!(rule => normalize);
        let steps = normalize.value.as_ref().map_or(Some(Vec::new()), |list| {
            let step = |item: &Value| item.as_str()?.parse::<Normalize>().ok();
            list.as_array()?.iter().map(step).collect()
        });
        if steps.is_none() {
            let labels: Vec<_> =
                Normalize::VARIANTS.iter().map(|step| format!("`{}`", step.label())).collect();
            self.problem(normalize.key, format!("must be a list of {}", labels.join(", ")));
        }
        let values = setting!(rule => values);
        let translations = values.value.as_ref().map_or(Some(BTreeMap::new()), |table| {
            table.as_table()?.iter().map(|(from, to)| Some((from.clone(), scalar(to)?))).collect()
        });
        if translations.is_none() {
            self.problem(values.key, "must be a table like `{ true = \"Yes\", false = \"No\" }`");
        }
        Some(Source::new(list).normalized(steps?).translated(translations?))
    }

    fn field(&mut self, setting: Setting<'_, String>) -> Option<FieldRef> {
        let text = setting.text();
        if text.is_empty() {
            return None;
        }
        let field = field_ref(text);
        if field.is_none() {
            self.problem(setting.key, format!("\"{text}\" {NOT_A_FIELD}"));
        }
        field
    }
}

const NOT_A_FIELD: &str =
    "is not a valid custom field; expected its id, `cf_...`, or its name, without `custom.`";

fn not_a_rule(key: &str) -> String {
    format!("must be a table like `{{ {key} = [\"$.traits.title\"] }}`")
}

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
            Err("must not have a list in the list; join several values with a template like `\"{$.traits.a} {$.traits.b}\"`"
                .into())
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
