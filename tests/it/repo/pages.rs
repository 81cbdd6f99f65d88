//! Links and code blocks of the README and all pages work.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use close_sync::config::{Config, Need};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const COMMANDS: [&str; 9] =
    ["run", "check", "certify", "plan", "test", "publish", "dlq", "simulate", "healthcheck"];

/// A Markdown file.
pub(crate) struct Page {
    path: PathBuf,
    pub(crate) text: String,
}

impl Page {
    fn read(path: PathBuf) -> Self {
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path, text }
    }

    pub(crate) fn of(path: &str) -> Self {
        Self::read(Path::new(ROOT).join(path))
    }

    /// The README and every page beside it.
    pub(crate) fn all() -> Vec<Self> {
        let docs = std::fs::read_dir(Path::new(ROOT).join("deploy/docs")).unwrap();
        let docs = docs.map(|entry| entry.unwrap().path());
        let others = [
            "README.md",
            "deploy/operating.md",
            "deploy/runbook.md",
            "deploy/CHANGELOG.md",
            "deploy/kubernetes/README.md",
        ];
        docs.chain(others.map(|path| Path::new(ROOT).join(path))).map(Self::read).collect()
    }

    fn name(&self) -> String {
        self.path.strip_prefix(ROOT).unwrap_or(&self.path).display().to_string()
    }

    /// The lines outside of code blocks.
    fn prose(&self) -> impl Iterator<Item = &str> {
        let mut is_code = false;
        self.text.lines().filter(move |line| {
            let is_fence = line.trim_start().starts_with("```");
            is_code ^= is_fence;
            !is_fence && !is_code
        })
    }

    /// The code blocks of a language.
    fn blocks(&self, language: &str) -> Vec<String> {
        let mut blocks = Vec::new();
        let mut lines = self.text.lines();
        while let Some(line) = lines.next() {
            if let Some(name) = line.trim_start().strip_prefix("```") {
                let block: Vec<_> =
                    lines.by_ref().map(str::trim_start).take_while(|line| *line != "```").collect();
                if name == language {
                    blocks.push(block.join("\n"));
                }
            }
        }
        blocks
    }

    /// The text between backticks.
    fn code_spans(&self) -> impl Iterator<Item = &str> {
        self.prose().flat_map(|line| line.split('`').skip(1).step_by(2))
    }

    fn link_targets(&self) -> impl Iterator<Item = &str> {
        self.prose()
            .flat_map(|line| line.split("](").skip(1))
            .filter_map(|rest| Some(rest.split_once(')')?.0))
    }

    /// The anchors that GitHub gives to the headings.
    fn anchors(&self) -> BTreeSet<String> {
        let headings =
            self.prose().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#'));
        let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
        headings
            .map(|title| {
                title.trim().to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
            })
            .collect()
    }
}

#[test]
fn every_link_resolves_with_its_anchor() {
    let mut checked = 0;
    let mut broken = Vec::new();
    for page in Page::all() {
        for target in page.link_targets().filter(|target| !target.starts_with("http")) {
            checked += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path =
                if file.is_empty() { page.path.clone() } else { page.path.parent().unwrap().join(file) };
            let resolves =
                path.exists() && (anchor.is_empty() || Page::read(path).anchors().contains(anchor));
            if !resolves {
                broken.push(format!("{}: {target}", page.name()));
            }
        }
    }
    assert!(checked > 50, "{checked}");
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_alert_links_to_its_runbook_section() {
    let alerts = std::fs::read_to_string(Path::new(ROOT).join("deploy/prometheus/alerts.yml")).unwrap();
    let anchors = Page::of("deploy/runbook.md").anchors();
    for url in alerts.lines().filter_map(|line| line.trim().strip_prefix("runbook_url: ")) {
        let anchor = url.strip_prefix("deploy/runbook.md#").unwrap();
        assert!(anchors.contains(anchor), "{url}");
    }
}

/// Paths in backticks are relative to the repository.
#[test]
fn every_path_in_the_text_exists() {
    let folders = ["deploy/", "tests/", "src/", ".ci/"];
    for page in Page::all() {
        for span in page.code_spans().filter(|span| folders.iter().any(|folder| span.starts_with(folder))) {
            let path = span.split(' ').next().unwrap();
            // kubectl writes the Deployment's name in the same form.
            let exists = path == "deploy/close-sync" || Path::new(ROOT).join(path).exists();
            assert!(exists, "{}: {path}", page.name());
        }
    }
}

#[test]
fn every_toml_block_is_a_valid_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    let environment = HashMap::from([("CLOSE_API_KEY".to_owned(), "api_key".to_owned())]);
    let mut checked = 0;
    for page in Page::all() {
        for block in page.blocks("toml") {
            std::fs::write(&file, &block).unwrap();
            if let Err(problems) = Config::load(Some(&file), &environment, Need::All) {
                panic!("{}: {problems}\n{block}", page.name());
            }
            checked += 1;
        }
    }
    assert!(checked >= 2, "{checked}");
}

#[test]
fn every_json_block_is_valid() {
    for page in Page::all() {
        for block in page.blocks("json") {
            serde_json::from_str::<serde_json::Value>(&block)
                .unwrap_or_else(|error| panic!("{}: {error}\n{block}", page.name()));
        }
    }
}

/// The help of a command, read once.
#[derive(Default)]
struct Help(BTreeMap<String, String>);

impl Help {
    /// `command` is a path of subcommands, or a script of the repository.
    fn of(&mut self, command: &str) -> &str {
        self.0.entry(command.to_owned()).or_insert_with(|| {
            let is_script = command.contains('/');
            let mut process =
                Command::new(if is_script { command } else { env!("CARGO_BIN_EXE_close-sync") });
            if !is_script {
                process.args(command.split_whitespace());
            }
            let output = process.arg("--help").current_dir(ROOT).output().unwrap();
            assert!(output.status.success(), "{command} --help: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
    }
}

/// Whether the help lists a flag, and not only a longer one.
fn lists(help: &str, flag: &str) -> bool {
    help.match_indices(flag).any(|(start, _)| {
        let is_word = |c: char| c.is_alphanumeric() || c == '-';
        !help[..start].ends_with(is_word) && !help[start + flag.len()..].starts_with(is_word)
    })
}

/// The command that starts at the first word, up to the next shell operator: its path and its flags.
fn command<'a>(words: &[&'a str]) -> Option<(String, Vec<&'a str>)> {
    let scripts = [
        "deploy/try",
        "deploy/rabbitmq-node",
        "tests/run",
        "tests/soak",
        "tests/takeover",
        "tests/versions",
        "tests/throughput",
    ];
    let program = *words.first()?;
    let ends = |word: &&&str| !matches!(**word, "|" | "&&" | ";" | "--" | "--help" | ")");
    let arguments: Vec<_> = words[1..].iter().take_while(ends).copied().collect();
    let path = if scripts.contains(&program) {
        program.to_owned()
    } else if matches!(program, "close-sync" | "target/release/close-sync" | "$run") {
        let name = arguments.first().filter(|name| COMMANDS.contains(name))?;
        let under = (*name == "dlq").then(|| arguments.get(1)).flatten();
        under.map_or_else(|| (*name).to_owned(), |under| format!("dlq {under}"))
    } else {
        return None;
    };
    let flags = arguments.iter().filter(|word| word.starts_with('-') && word.len() > 1);
    Some((path, flags.map(|word| word.split('=').next().unwrap()).collect()))
}

#[test]
fn every_command_in_the_text_has_its_flags() {
    let mut help = Help::default();
    let (mut checked, mut unknown) = (0, Vec::new());
    for page in Page::all() {
        let blocks = page.blocks("sh").join("\n").replace("\\\n", " ");
        for line in blocks.lines().chain(page.code_spans()) {
            let line = line.split(" # ").next().unwrap().replace(['(', ')'], " ");
            let words: Vec<_> = line.split_whitespace().collect();
            for start in 0..words.len() {
                let Some((path, flags)) = command(&words[start..]) else { continue };
                checked += 1;
                let help = help.of(&path);
                unknown.extend(
                    flags
                        .iter()
                        .filter(|flag| !lists(help, flag))
                        .map(|flag| format!("{}: {path} {flag}", page.name())),
                );
            }
        }
    }
    assert!(checked > 50, "{checked}");
    assert!(unknown.is_empty(), "{unknown:#?}");
}

/// A mistyped name would be skipped by the test above.
#[test]
fn every_line_of_a_shell_block_names_a_command_of_the_program() {
    for page in Page::all() {
        for line in page.blocks("sh").iter().flat_map(|block| block.lines()) {
            let Some(rest) = line.strip_prefix("close-sync ") else { continue };
            let name = rest.split(' ').next().unwrap();
            assert!(COMMANDS.contains(&name), "{}: {line}", page.name());
        }
    }
}

#[test]
fn the_readme_is_short() {
    assert!(Page::of("README.md").text.lines().count() <= 200);
}
