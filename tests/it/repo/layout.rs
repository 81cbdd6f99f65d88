//! The order of modules that `src/lib.rs` describes holds: a module uses only what stands below it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::repo::docs::rust_files;

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The modules of `src/lib.rs`, top down.
fn order() -> Vec<String> {
    let lib = std::fs::read_to_string(source().join("lib.rs")).unwrap();
    let modules = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    modules.map(str::to_owned).collect()
}

/// The path of a file as a module, such as `consumer::settle`.
fn module_of(file: &Path) -> String {
    let path = file.strip_prefix(source()).unwrap().with_extension("");
    let path = path.to_str().unwrap().replace('/', "::");
    path.strip_suffix("::mod").unwrap_or(&path).to_owned()
}

/// The code of each module, without comments and without tests.
fn modules() -> BTreeMap<String, String> {
    let files = rust_files(&source()).into_iter();
    let modules = files.map(|file| (module_of(&file), std::fs::read_to_string(&file).unwrap()));
    let is_test = |name: &str| name.contains("tests") || name.ends_with("::properties");
    let code = |text: String| {
        let (code, _) = text.split_once("#[cfg(test)]\nmod tests {").unwrap_or((&text, ""));
        let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.collect::<Vec<_>>().join("\n")
    };
    modules.filter(|(name, _)| !is_test(name)).map(|(name, text)| (name, code(text))).collect()
}

/// The paths behind `crate::` in a module.
fn paths(code: &str) -> impl Iterator<Item = &str> {
    let end = |rest: &str| rest.find(|c: char| !c.is_ascii_lowercase() && c != '_' && c != ':');
    code.split("crate::")
        .skip(1)
        .map(move |rest| rest[..end(rest).unwrap_or(rest.len())].trim_end_matches(':'))
}

#[test]
fn a_module_uses_only_modules_below_it() {
    let order = order();
    let rank = |name: &str| order.iter().position(|module| module == name);
    let mut wrong = Vec::new();
    for (name, code) in modules() {
        let folder = name.split("::").next().unwrap();
        for path in paths(&code) {
            let used = path.split("::").next().unwrap();
            if rank(used) < rank(folder) && rank(used).is_some() && rank(folder).is_some() {
                wrong.push(format!("{name} uses {path}"));
            }
        }
    }
    assert!(order.len() > 10 && wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_files_import_each_other() {
    let modules = modules();
    let file = |path: &str| {
        let mut path = path.to_owned();
        while !modules.contains_key(&path) {
            path.truncate(path.rfind("::")?);
        }
        Some(path)
    };
    // A file may use types of the module that it is a part of.
    let uses = |name: &str, code: &str| -> BTreeSet<String> {
        let used = paths(code).filter_map(file);
        used.filter(|used| used != name && !name.starts_with(&format!("{used}::"))).collect()
    };
    let mut left: BTreeMap<_, _> =
        modules.iter().map(|(name, code)| (name.clone(), uses(name, code))).collect();
    loop {
        let leaves: Vec<_> = left
            .iter()
            .filter(|(_, uses)| uses.iter().all(|used| !left.contains_key(used)))
            .map(|(name, _)| name.clone())
            .collect();
        if leaves.is_empty() {
            break;
        }
        left.retain(|name, _| !leaves.contains(name));
    }
    assert!(left.is_empty(), "in a circle, or above one: {left:#?}");
}
