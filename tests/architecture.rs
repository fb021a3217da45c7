//! The floors of the house, checked: who may import whom, and which guest crate lives where.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Every module of `src`, with the modules it may import. A floor sees only floors listed above it.
const FLOORS: &[(&str, &[&str])] = &[
    ("publish", &[]),
    ("telemetry", &[]),
    ("hub", &["publish"]),
    ("kernels", &[]),
    ("ops", &["kernels"]),
    ("text", &["publish"]),
    ("model", &["publish", "kernels", "ops"]),
    ("adapters", &["publish", "ops", "text", "model"]),
    ("data", &["publish", "text"]),
    ("engine", &["telemetry", "kernels", "ops", "model", "adapters"]),
    ("train", &["publish", "telemetry", "data", "ops", "model", "adapters"]),
    ("eval", &["publish", "text", "data", "adapters", "engine"]),
    ("jobs", &["publish", "telemetry", "text", "data", "adapters", "engine", "train", "eval"]),
    (
        "api",
        &["publish", "telemetry", "text", "data", "model", "adapters", "engine", "eval", "jobs"],
    ),
    (
        "cli",
        &[
            "publish",
            "telemetry",
            "hub",
            "text",
            "kernels",
            "ops",
            "model",
            "adapters",
            "data",
            "engine",
            "train",
            "eval",
            "jobs",
            "api",
        ],
    ),
];

/// Every guest crate that is confined, with the only floors that may name it.
const GUESTS: &[(&str, &[&str])] = &[
    ("axum", &["api"]),
    ("rusqlite", &["jobs"]),
    ("ureq", &["jobs", "cli"]),
    ("rustix", &["publish", "jobs", "cli"]),
    ("csv", &["data"]),
    ("flate2", &["data"]),
    ("parquet", &["data"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("hf_hub", &["hub"]),
    ("metrics", &["telemetry"]),
    ("metrics_exporter_prometheus", &["telemetry"]),
    ("tokenizers", &["text"]),
    ("minijinja", &["text"]),
    ("candle_nn", &["ops", "train"]),
    ("candle_core", &["ops", "model", "adapters", "engine", "train"]),
    ("safetensors", &["model", "adapters", "train", "cli"]),
    ("tokio", &["hub", "engine", "api", "cli"]),
    ("rayon", &["kernels", "train", "cli"]),
    ("anyhow", &["cli"]),
];

#[test]
fn every_import_points_downwards() {
    let mut wrong = Vec::new();
    for (floor, below) in FLOORS {
        for (place, code) in code_lines(floor) {
            for other in names_after(&code, "crate::") {
                if other != *floor && !below.contains(&other.as_str()) {
                    wrong.push(format!("{place}: `{floor}` may not import `crate::{other}`"));
                }
            }
            for (guest, homes) in GUESTS {
                if !homes.contains(floor) && !names_after(&code, &format!("{guest}::")).is_empty() {
                    wrong.push(format!("{place}: `{floor}` may not know `{guest}`"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn what_is_published_is_written_through_the_one_door() {
    let changes =
        ["write(", "copy(", "rename(", "hard_link(", "create_dir", "remove_file(", "remove_dir"];
    let changes = changes.map(|name| format!("fs::{name}"));
    let mut wrong = Vec::new();
    for floor in ["adapters", "train"] {
        for (place, code) in code_lines(floor) {
            let found = changes.iter().any(|change| code.contains(change));
            if found || code.contains("File::create") || code.contains("File::options") {
                wrong.push(format!("{place}: `publish::disk` does this, and tests its failures"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_floor_stands_above_what_it_imports() {
    for (level, (floor, below)) in FLOORS.iter().enumerate() {
        for other in *below {
            let stands_above = FLOORS[..level].iter().any(|(lower, _)| lower == other);
            assert!(stands_above, "`{floor}` may import `{other}`, but stands below it");
        }
    }
}

#[test]
fn every_module_has_a_floor() {
    for path in entries(Path::new("src")) {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let known = ["main", "lib"].contains(&name) || FLOORS.iter().any(|(f, _)| *f == name);
        assert!(known, "give `src/{name}` a floor in tests/architecture.rs");
    }
}

/// The names that follow each `prefix` in `code`. A grouped import (`crate::{a, b}`) yields `{`, so
/// it never passes: write one `use crate::floor::…` line per floor.
fn names_after(code: &str, prefix: &str) -> Vec<String> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(prefix)
        .filter(|(at, _)| !code[..*at].ends_with(is_name))
        .map(|(at, _)| {
            let rest = &code[at + prefix.len()..];
            let name: String = rest.chars().take_while(|c| is_name(*c)).collect();
            if name.is_empty() { rest.chars().take(1).collect() } else { name }
        })
        .collect()
}

/// Every line of code of a floor, with its place. Comments are cut off.
fn code_lines(floor: &str) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let mut waiting =
        vec![Path::new("src").join(floor), Path::new("src").join(format!("{floor}.rs"))];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(entries(&path));
        } else if path.is_file() {
            for (index, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
                let code = line.split("//").next().unwrap().to_owned();
                lines.push((format!("{}:{}", path.display(), index + 1), code));
            }
        }
    }
    lines
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}
