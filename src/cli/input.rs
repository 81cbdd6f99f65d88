//! Input files of commands.

use std::path::Path;

use tokio::io::AsyncReadExt;

use crate::cli::failure::Failure;
use crate::text::line;

/// Reads a whole file. `-` is standard input.
pub(super) async fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    let unreadable = |error| cannot_read(file, &error);
    if file.as_os_str() != "-" {
        return tokio::fs::read(file).await.map_err(unreadable);
    }
    let mut bytes = Vec::new();
    tokio::io::stdin().read_to_end(&mut bytes).await.map_err(unreadable)?;
    Ok(bytes)
}

pub(super) fn cannot_read(file: &Path, error: &std::io::Error) -> Failure {
    Failure::Input(format!("cannot read {}: {error}", line(&file.display().to_string())))
}
