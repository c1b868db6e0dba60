//! Instructions that the stages of a request take, counted by valgrind, and held against bounds.
//!
//! This program runs itself under callgrind, twice for each kind of request, with different numbers of them: the difference leaves
//! the start out. What is counted does not depend on what else the machine does, so a bound of a few per cent holds everywhere where
//! the compiler is the same. It does depend on the profile: the committed bounds are of the dev profile, which `ci/test` builds.

mod callgrind;
mod core;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use self::callgrind::Profile;
use self::core::{BATCH, Core, Kind};

/// Batches of the two counted runs: the store has made checkpoints in the difference.
const COUNTED: [u32; 2] = [64, 576];
/// How much a count may be above its bound, per cent.
const SLACK_PERCENT: f64 = 3.0;
/// Marks the run that is counted, in the arguments.
const RUN: &str = "--run";

/// What is counted: a row of the table, what the names of its functions have in them, and of what is below those has a row itself.
const ROWS: [(&str, &str, Option<&str>); 7] = [
    ("parse", "stage_parse", None),
    ("order", "stage_order", Some(COPY)),
    ("copy and checksum", COPY, None),
    ("submit", "stage_submit", None),
    ("store", "stage_store", None),
    ("complete", "stage_complete", None),
    ("answer", "stage_answer", None),
];
const COPY: &str = "copy_payload";

/// Instructions per request, by stage.
type Counts = BTreeMap<String, f64>;

/// Of reads and of writes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bounds {
    read: Counts,
    write: Counts,
}

/// What the counted program does: serves so many batches of one kind.
///
/// # Errors
/// A kind or number that is none, or a core that does not do what it should.
pub(crate) fn serve(kind: &str, batches: &str) -> anyhow::Result<()> {
    let kind = match kind {
        "read" => Kind::Read,
        "write" => Kind::Write,
        other => bail!("{other:?} is neither read nor write"),
    };
    Core::new(kind)?.run(batches.parse().context("not a number of batches")?)
}

/// Counts, prints, and holds what was counted against bounds, if there are some; whether all are kept.
///
/// # Errors
/// No valgrind, or bounds that cannot be read.
pub(crate) fn run(bounds: Option<&Path>, json: bool) -> anyhow::Result<bool> {
    let bounds = bounds.map(read_bounds).transpose()?;
    let counted = Bounds { read: count("read")?, write: count("write")? };
    let broken = bounds.as_ref().map(|bounds| broken(&counted, bounds)).unwrap_or_default();
    if json {
        let report = serde_json::json!({
            "kind": "stages", "read": counted.read, "write": counted.write, "bounds": bounds, "broken": broken,
        });
        println!("{report}");
    } else {
        print(&counted, bounds.as_ref());
        for line in &broken {
            println!("{line}");
        }
    }
    Ok(broken.is_empty())
}

fn read_bounds(path: &Path) -> anyhow::Result<Bounds> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} has no bounds of stages", path.display()))
}

/// What is above its bound, or has none, in words.
fn broken(counted: &Bounds, bounds: &Bounds) -> Vec<String> {
    let both = [("read", &counted.read, &bounds.read), ("write", &counted.write, &bounds.write)];
    let lines = both.into_iter().flat_map(|(kind, counted, bounds)| {
        counted.iter().filter_map(move |(stage, count)| match bounds.get(stage) {
            None => Some(format!("{kind}, {stage}: there is no bound")),
            // A stage that does next to nothing may do a little more.
            Some(bound) if *count > bound * (1.0 + SLACK_PERCENT / 100.0) + 1.0 => Some(format!(
                "{kind}, {stage}: {count:.0} instructions, {:.1} % more than the bound of {bound:.0}",
                (count / bound - 1.0) * 100.0
            )),
            Some(_) => None,
        })
    });
    lines.collect()
}

fn print(counted: &Bounds, bounds: Option<&Bounds>) {
    let bound = |of: fn(&Bounds) -> &Counts, stage: &str| {
        let bound = bounds.and_then(|bounds| of(bounds).get(stage));
        bound.map_or_else(|| "–".to_owned(), |bound| format!("{bound:.0}"))
    };
    println!("{:<24} {:>8} {:>8} {:>8} {:>8}", "instructions per 4 KiB", "read", "bound", "write", "bound");
    for stage in ROWS.iter().map(|(stage, ..)| *stage).chain(["all"]) {
        println!(
            "{stage:<24} {:>8.0} {:>8} {:>8.0} {:>8}",
            counted.read[stage],
            bound(|bounds| &bounds.read, stage),
            counted.write[stage],
            bound(|bounds| &bounds.write, stage)
        );
    }
}

fn count(kind: &str) -> anyhow::Result<Counts> {
    let [few, more] = COUNTED.map(|batches| profile(kind, batches));
    let (few, more) = (few?, more?);
    let requests = f64::from((COUNTED[1] - COUNTED[0]) * BATCH);
    let within = |name: &str| {
        (more.instructions_within(name) as f64 - few.instructions_within(name) as f64) / requests
    };
    let row = |(stage, name, but): &(&str, &str, Option<&str>)| {
        ((*stage).to_owned(), within(name) - but.map_or(0.0, within))
    };
    let mut counts: Counts = ROWS.iter().map(row).collect();
    let all = counts.values().sum();
    ensure!(
        counts["parse"] > 0.0,
        "callgrind has not seen the stages: was the program stripped of its symbols?"
    );
    counts.insert("all".to_owned(), all);
    Ok(counts)
}

/// This program under callgrind.
fn profile(kind: &str, batches: u32) -> anyhow::Result<Profile> {
    let out = tempfile::NamedTempFile::new().context("cannot make a temporary file")?;
    let output = Command::new("valgrind")
        .arg("--tool=callgrind")
        .arg(format!("--callgrind-out-file={}", out.path().display()))
        .arg(std::env::current_exe()?)
        .args(["stages", RUN, kind, &batches.to_string()])
        .output()
        .context("cannot run valgrind: install it")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "valgrind has failed: {}", said.trim());
    let text = std::fs::read_to_string(out.path()).context("cannot read what callgrind wrote")?;
    Profile::parse(&text).context("what callgrind wrote is not understood")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(read: f64, write: f64) -> Bounds {
        let counts = |count| BTreeMap::from([("parse".to_owned(), count)]);
        Bounds { read: counts(read), write: counts(write) }
    }

    #[test]
    fn more_than_the_slack_above_a_bound_is_told() {
        assert_eq!(broken(&bounds(1030.0, 990.0), &bounds(1000.0, 1000.0)), Vec::<String>::new());
        let told = broken(&bounds(1000.0, 1100.0), &bounds(1000.0, 1000.0));
        assert_eq!(told, ["write, parse: 1100 instructions, 10.0 % more than the bound of 1000"]);
    }

    #[test]
    fn a_stage_without_a_bound_is_told() {
        let none = Bounds { read: BTreeMap::new(), write: BTreeMap::new() };
        assert_eq!(broken(&bounds(1.0, 1.0), &none).len(), 2);
    }
}
