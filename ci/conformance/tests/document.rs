//! docs/conformance.md names all cases, and only tests that are there.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The folder of each crate that the document may name.
const CRATES: [(&str, &str); 5] = [
    ("torus-conformance", "ci/conformance"),
    ("torus-dataplane", "dataplane"),
    ("torus-e2e", "ci/e2e"),
    ("torus-control", "control"),
    ("aoe-xdp", "aoe-xdp"),
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

fn source_files(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            source_files(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// Functions without self of a crate: (name, whether it is a test or one of the defined cases).
fn functions(folder: &str) -> BTreeMap<String, bool> {
    let root = workspace().join(folder);
    let mut files = Vec::new();
    for part in ["src", "tests"].map(|part| root.join(part)).into_iter().filter(|part| part.is_dir()) {
        source_files(&part, &mut files);
    }
    let mut found = BTreeMap::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let is_case = file.starts_with(workspace().join("ci/conformance/src/cases"));
        let mut is_test = false;
        for line in text.lines().map(str::trim_start) {
            let declared = line.strip_prefix("pub ").unwrap_or(line).strip_prefix("fn ");
            if let Some(name) = declared.and_then(|rest| rest.split(['(', '<']).next()) {
                let marked = found.entry(name.to_owned()).or_default();
                *marked |= is_test || is_case;
                is_test = false;
            } else if line == "#[test]" {
                is_test = true;
            } else if !line.starts_with("#[") && !line.starts_with("//") {
                is_test = false;
            }
        }
    }
    found
}

/// The number in the name of a case.
fn number(name: &str) -> Option<u32> {
    name.strip_prefix("case_")?.split('_').next()?.parse().ok()
}

/// The document's rows: number → what is in back-quotes, as (crate, test).
fn rows() -> BTreeMap<u32, Vec<(String, String)>> {
    let text = fs::read_to_string(workspace().join("docs/conformance.md")).unwrap();
    let mut rows = BTreeMap::new();
    for line in text.lines() {
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        let Some(case) = columns.get(1).and_then(|first| first.parse().ok()) else { continue };
        // Columns themselves may hold bars, escaped: the last two are the tests'.
        let [.., model, wire, _] = columns[..] else { panic!("{line}") };
        assert!(!model.is_empty() && !wire.is_empty(), "case {case} names no test and no reason: {line}");
        let quoted = [model, wire].into_iter().flat_map(|cell| cell.split('`').skip(1).step_by(2));
        let named = |name: &str| match name.split_once("::") {
            Some((of, test)) => (of.to_owned(), test.to_owned()),
            None => ("torus-conformance".to_owned(), name.to_owned()),
        };
        let before = rows.insert(case, quoted.map(named).collect());
        assert!(before.is_none(), "case {case} is there twice");
    }
    rows
}

#[test]
fn all_cases_are_listed_and_their_tests_exist() {
    let rows = rows();
    assert!(rows.keys().copied().eq(1..=86), "all 86 cases: {:?}", rows.keys());
    let mut listed = BTreeSet::new();
    for (of, folder) in CRATES {
        let functions = functions(folder);
        for (case, tests) in &rows {
            for (_, test) in tests.iter().filter(|(named, _)| named == of) {
                assert_eq!(functions.get(test), Some(&true), "case {case}: {of} has no test {test}");
                assert!(number(test).is_none_or(|number| number == *case), "{test} is listed as case {case}");
                listed.insert((of, test.clone()));
            }
        }
        for test in functions.keys().filter(|test| number(test).is_some()) {
            assert!(listed.contains(&(of, test.clone())), "docs/conformance.md does not name {of}::{test}");
        }
    }
    let known: BTreeSet<&str> = CRATES.iter().map(|(of, _)| *of).collect();
    for (case, tests) in &rows {
        for (of, test) in tests {
            assert!(known.contains(of.as_str()), "case {case} names {test} of {of}, which is no crate here");
        }
    }
}
