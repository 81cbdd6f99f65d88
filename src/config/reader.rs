//! Checks single settings. A value that is not valid is reported, and `None`.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::config::keys::SECRETS;
use crate::config::problems::Problem;
use crate::config::raw::Setting;

/// Checks settings and collects the problems.
pub(super) struct Reader<'a> {
    pub(super) problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    pub(super) fn problem(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem::new(key, message));
    }

    /// Parses a text. `kind` and `expected` complete the message "… is not a valid {kind}; expected {expected}".
    pub(super) fn parsed<T>(
        &mut self,
        setting: Setting<'_, String>,
        kind: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = setting.text();
        let value = parse(text);
        if value.is_none() {
            let is_secret = SECRETS.contains(&setting.key.as_str());
            let shown = if is_secret { "the value".to_owned() } else { format!("\"{text}\"") };
            self.problem(setting.key, format!("{shown} is not a valid {kind}; expected {expected}"));
        }
        value
    }

    pub(super) fn duration(&mut self, setting: Setting<'_, String>, least: Duration) -> Option<Duration> {
        let (key, text) = (setting.key.clone(), setting.text());
        let value = self.parsed(setting, "duration", "a value like `30s` or `5m`", duration)?;
        if value < least {
            let least = jiff::SignedDuration::try_from(least).unwrap_or_default();
            self.problem(key, format!("\"{text}\" is too short; expected at least `{least:#}`"));
            return None;
        }
        Some(value)
    }

    pub(super) fn number(&mut self, setting: Setting<'_, i64>, range: RangeInclusive<i64>) -> Option<i64> {
        let number = *setting.value;
        if !range.contains(&number) {
            let message = format!("{number} is not between {} and {}", range.start(), range.end());
            self.problem(setting.key, message);
            return None;
        }
        Some(number)
    }

    /// A name for the broker: AMQP limits names to 255 bytes, and suffixes are added to ours.
    pub(super) fn broker_name(&mut self, setting: Setting<'_, String>) -> Option<String> {
        let expected = "1 to 200 bytes that do not begin with `amq.`";
        self.parsed(setting, "name", expected, |text| {
            let fits = (1..=200).contains(&text.len()) && !text.starts_with("amq.");
            fits.then(|| text.to_owned())
        })
    }
}

/// Longer times are mistakes, and too long for arithmetic with clocks.
const LONGEST: Duration = Duration::from_hours(24 * 366);

pub(super) fn duration(text: &str) -> Option<Duration> {
    let duration: Duration = text.parse::<jiff::SignedDuration>().ok()?.try_into().ok()?;
    (duration <= LONGEST).then_some(duration)
}
