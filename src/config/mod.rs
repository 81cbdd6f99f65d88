//! Settings from three layers: the commented defaults compiled in, a TOML file, the environment.
//!
//! `layers` merges them into one table. `raw` gives that table a typed shape. `process`, `destination` and `mapping`
//! check the values and build the typed `settings`. All mistakes are collected and reported at once, each with key,
//! value and remedy (`problems`). Values of secret `keys` are never shown.
//!
//! Each file imports only files that come later in this list: `layers`, `process`, `destination`, `effective`, `mapping`,
//! `settings`, `reader`, `problems`, `keys`, `raw`.
//!
//! Each key has one environment variable, its path in capitals joined by `_`. A secret has a second one with the
//! suffix `_FILE`, which names a file with the value.
//!
//! One process can serve several Close organizations: `[destinations.<name>]` has the settings that differ from the rest
//! of the file, under the same keys. It is a table by name and not a list, because the name is part of variables
//! (`DESTINATIONS_EMEA_CLOSE_API_KEY`), labels and queues.
//!
//! This is the only module that reads raw settings or the environment. The modules below have their own
//! validated settings and do not import this one.

mod destination;
mod effective;
mod keys;
mod layers;
mod mapping;
mod problems;
mod process;
mod raw;
mod reader;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;

pub use keys::DEFAULTS;
pub use layers::{Layers, environment};
pub use problems::Problems;
pub use settings::{Config, Destination, LogFormat, Need};

impl Config {
    /// Reads and checks all settings.
    ///
    /// # Errors
    /// All problems at once.
    pub fn load(
        file: Option<&Path>,
        environment: &HashMap<String, String>,
        need: Need,
    ) -> Result<Self, Problems> {
        Layers::load(file, environment)?.read(need)
    }
}
