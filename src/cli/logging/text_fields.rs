//! Fields of log lines in the format `text`.
//!
//! A value may come from a producer, RabbitMQ or Close. Quoted where it is not one plain word, it can neither begin a
//! line, nor look like another field, nor control the terminal. In the format `json` values are escaped anyway.

use std::fmt::{self, Debug};

use anstyle::Style;
use tracing::field::{Field, Visit};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;

use crate::text;

pub(super) struct TextFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = Visitor { writer, is_first: true, result: Ok(()) };
        fields.record(&mut visitor);
        visitor.result
    }
}

struct Visitor<'writer> {
    writer: Writer<'writer>,
    is_first: bool,
    result: fmt::Result,
}

impl Visitor<'_> {
    fn write(&mut self, field: &Field, value: &str) -> fmt::Result {
        if !std::mem::take(&mut self.is_first) {
            self.writer.write_char(' ')?;
        }
        let name = field.name().trim_start_matches("r#");
        if name == "message" {
            return self.writer.write_str(&text::line(value));
        }
        let (italic, dim) = if self.writer.has_ansi_escapes() {
            (Style::new().italic(), Style::new().dimmed())
        } else {
            (Style::new(), Style::new())
        };
        write!(self.writer, "{italic}{name}{italic:#}{dim}={dim:#}")?;
        let is_word = |c: char| !c.is_whitespace() && !matches!(c, '=' | '"' | '\'' | '\\' | '{' | '}');
        if !value.is_empty() && value.chars().all(is_word) && text::line(value) == value {
            self.writer.write_str(value)
        } else {
            write!(self.writer, "{value:?}")
        }
    }
}

impl Visit for Visitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        // Fields that `tracing-log` adds describe the place in the code.
        if self.result.is_ok() && !field.name().starts_with("log.") {
            self.result = self.write(field, value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Buffer {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    /// The line that `log` writes.
    fn logged(ansi: bool, log: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(buffer.clone())
            .with_ansi(ansi)
            .with_target(false)
            .without_time()
            .fmt_fields(TextFields)
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn no_value_can_forge_a_line_or_a_field() {
        let hostile = [
            "x\n2026-11-24 ERROR forged",
            "x audit=true",
            "x=1",
            "\"x\" who=\"admin\"",
            "\u{1b}[2J",
            "\u{9b}2J",
            "\u{202e}txt",
            "a\u{2028}b",
            "a\u{200b}b",
            "a\rb",
            "} other{",
            "",
        ];
        for value in hostile {
            let quoted = format!("{value:?}");
            for line in [
                logged(false, || tracing::info!(value, "done")),
                logged(false, || tracing::info!(%value, "done")),
                logged(false, || tracing::info!(value = %value.to_owned(), "done")),
            ] {
                assert_eq!(line, format!(" INFO done value={quoted}\n"));
            }
            let in_span = logged(false, || {
                tracing::info_span!("work", %value).in_scope(|| tracing::info!("done"));
            });
            assert_eq!(in_span, format!(" INFO work{{value={quoted}}}: done\n"));
            let colored = logged(true, || tracing::info!(%value, "done"));
            assert_eq!(colored.lines().count(), 1, "{colored:?}");
            assert!(!colored.contains("\u{1b}[2J"), "{colored:?}");
            let message = logged(false, || tracing::info!("{value}"));
            assert!(message.lines().count() == 1 && !message.contains(['\u{1b}', '\u{9b}']), "{message:?}");
        }
    }

    #[test]
    fn plain_words_and_numbers_stay_readable() {
        let line = logged(false, || {
            tracing::info!(event = "pause_began", took = 1.5, count = 3, address = %"127.0.0.1:9090", name = "Zoë", "a b");
        });
        assert_eq!(line, " INFO a b event=pause_began took=1.5 count=3 address=127.0.0.1:9090 name=Zoë\n");
    }
}
