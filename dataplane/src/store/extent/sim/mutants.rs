//! Deliberate bugs of what goes beside the journal, each of which a history must catch: `ci/soak mutants`. `TORUS_STORE_MUTANT` names the
//! only one to run.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

use torus_replication::mutants::{Mutant, activate};

use super::world::{Lab, Plan};
use super::{Rng, history, number, planned, runs, torn, turns};

/// Within so many seeds a mutant must be caught.
const SEEDS_MAX: u64 = 500;

/// The plans that fit it.
fn plans(mutant: Mutant) -> (&'static str, fn(&mut Rng) -> Plan) {
    match mutant {
        Mutant::RedirectedOverPending | Mutant::InPlaceUnproved | Mutant::BegunWithoutMark => {
            ("turns", turns)
        }
        Mutant::TornHeaderKept => ("torn", torn),
        _ => ("runs", runs),
    }
}

/// After how many seeds it is caught.
fn caught(mutant: Mutant, plans: fn(&mut Rng) -> Plan, first: u64) -> Option<u64> {
    let mut lab = Lab::default();
    for seed in first..first + SEEDS_MAX {
        let (plan, rng) = planned(seed, plans);
        activate(Some(mutant));
        let ran = catch_unwind(AssertUnwindSafe(|| history(&plan, rng.clone(), &mut lab)));
        activate(None);
        if ran.is_err() {
            // It must be what caught it.
            history(&plan, rng, &mut Lab::default());
            return Some(seed - first + 1);
        }
    }
    None
}

#[test]
fn every_mutant_is_caught() {
    let only = std::env::var("TORUS_STORE_MUTANT").ok();
    let first = number("TORUS_STORE_FROM").unwrap_or(1);
    let mut table = String::from("| mutant | histories | seeds |\n|---|---|---|\n");
    let mut missed = Vec::new();
    for mutant in Mutant::STORE {
        if only.as_ref().is_some_and(|only| format!("{mutant:?}") != *only) {
            continue;
        }
        let (name, plans) = plans(mutant);
        let seeds = caught(mutant, plans, first);
        println!("{mutant:?}: {name} {seeds:?}");
        let cell = seeds.map_or_else(|| format!("> {SEEDS_MAX}"), |seeds| seeds.to_string());
        let _ = writeln!(table, "| {mutant:?} | {name} | {cell} |");
        if seeds.is_none() {
            missed.push(mutant);
        }
    }
    println!("\n{table}");
    assert!(missed.is_empty(), "not caught within {SEEDS_MAX} seeds: {missed:?}");
}
