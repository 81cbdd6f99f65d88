//! Standard error for log lines in JSON, which stay the same data: characters that a terminal would obey are escaped.

use std::io::{self, Write};

use tracing_subscriber::fmt::MakeWriter;

use crate::text;

pub(super) struct JsonStderr;

impl MakeWriter<'_> for JsonStderr {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

impl Write for JsonStderr {
    /// Each call has one whole line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        match std::str::from_utf8(line) {
            // Nearly every line.
            Ok(_) if line.iter().all(|byte| *byte < 0x7f) => stderr.write_all(line)?,
            Ok(text) => stderr.write_all(text::json(text).as_bytes())?,
            Err(_) => stderr.write_all(text::json(&String::from_utf8_lossy(line)).as_bytes())?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
