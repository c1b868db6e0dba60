//! Deliberate bugs of the real code, each of which the simulator of clusters must catch: `RUSTFLAGS='--cfg mutants' cargo test -p torus-sim --test
//! mutants`. `TORUS_SIM_MUTANT` names the only one to run.
#![cfg(mutants)]

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use torus_replication::mutants::{Mutant, activate};
use torus_sim::cluster::run;
use torus_sim::cluster::scenarios::Scenario;

/// Within so many seeds, each of the scenario that fits and of any, a mutant must be caught.
const SEEDS_MAX: u64 = 2_000;
/// Of any run so many are tried: the comparison says what a scenario is worth.
const ANY_MAX: u64 = 100;

/// The scenario that fits it.
fn scenario(mutant: Mutant) -> Scenario {
    match mutant {
        Mutant::MarkRaised
        | Mutant::MarkAboveWrites
        | Mutant::ResyncSourceOnly
        | Mutant::EqualVersionSkipped
        | Mutant::HigherVersionWins
        | Mutant::ResyncBackwards
        | Mutant::AbsentKept
        | Mutant::JoinAfterFailedWrite
        | Mutant::CopyWithoutLock
        | Mutant::UnlockedEarly
        | Mutant::SequenceRestarts
        | Mutant::StaleRead => Scenario::Return,
        Mutant::LogReleasedLocally
        | Mutant::StableBeforeEqual
        | Mutant::ReconcileSkipped
        | Mutant::AckAfterFirst => Scenario::Logs,
        Mutant::SuspectGood | Mutant::BadBlockMerged | Mutant::AckBeforeDurable => Scenario::Power,
        Mutant::OpenWithoutDrain | Mutant::ConnectionServedEarly => Scenario::Stall,
        Mutant::FenceSkipped
        | Mutant::RestartWithoutQuarantine
        | Mutant::RenewAfterOpen
        | Mutant::PassedForgotten
        | Mutant::GrantFromReply
        | Mutant::NoGrant
        | Mutant::GrantsUncheckedAtReply
        | Mutant::GenerationUnchecked => Scenario::Fence,
        Mutant::HandedBackEarly | Mutant::CleanThoughUnequal | Mutant::HandedBackForGood => {
            Scenario::HandOver
        }
        Mutant::RedirectedOntoItself
        | Mutant::RedirectedOverPending
        | Mutant::InPlaceUnproved
        | Mutant::BegunWithoutMark
        | Mutant::FreshDataUnread
        | Mutant::TornHeaderKept
        | Mutant::VacatedTooEarly
        | Mutant::WrittenWhileMoved
        | Mutant::FormerSlotIgnored => unreachable!("the store's own simulation has it"),
        Mutant::RetireWithoutFence | Mutant::OwnerCompleteAtOnce | Mutant::LearnerKeptThroughMove => {
            Scenario::Move
        }
        Mutant::JoinInDoubtUndone
        | Mutant::EjectionInDoubtDone
        | Mutant::ChangeWithoutCompare
        | Mutant::WishForgotten
        | Mutant::EjectBelowMin => Scenario::Doubt,
    }
}

/// Who caught it, and after how many seeds.
fn caught(mutant: Mutant, scenario: Scenario, first: u64, most: u64) -> Option<(String, u64)> {
    for seed in 0..most {
        activate(Some(mutant));
        let ran = catch_unwind(AssertUnwindSafe(|| run(first + seed, |random| scenario.plan(random))));
        activate(None);
        match ran {
            Ok(Ok(_)) => {}
            Ok(Err(failure)) => return Some((failure.checker.to_string(), seed + 1)),
            Err(_) => return Some(("assertion".into(), seed + 1)),
        }
    }
    None
}

#[test]
fn every_mutant_is_caught() {
    let only = std::env::var("TORUS_SIM_MUTANT").ok();
    let first = std::env::var("TORUS_SIM_FROM").ok().and_then(|from| from.parse().ok()).unwrap_or(1);
    let wanted: Vec<Mutant> = Mutant::CLUSTER
        .into_iter()
        .filter(|mutant| only.as_ref().is_none_or(|only| format!("{mutant:?}") == *only))
        .collect();
    assert!(!wanted.is_empty(), "there is no such mutant");
    let rows = Mutex::new(vec![None; wanted.len()]);
    let next = Mutex::new(0..wanted.len());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, std::num::NonZero::get) {
            scope.spawn(|| {
                loop {
                    let Some(at) = next.lock().expect("no thread panics").next() else { return };
                    let mutant = wanted[at];
                    let scenario = scenario(mutant);
                    let fitting = caught(mutant, scenario, first, SEEDS_MAX);
                    println!("{mutant:?}: {scenario:?} {fitting:?}");
                    let any = caught(mutant, Scenario::Any, first, ANY_MAX);
                    println!("{mutant:?}: any {any:?}");
                    rows.lock().expect("no thread panics")[at] = Some((scenario, fitting, any));
                }
            });
        }
    });
    let mut table = String::from(
        "| mutant | scenario | caught by | seeds | by any run | seeds |\n|---|---|---|---|---|---|\n",
    );
    let mut missed = Vec::new();
    let cells = |caught: &Option<(String, u64)>, most: u64| match caught {
        Some((checker, seeds)) => format!("{checker} | {seeds}"),
        None => format!("- | > {most}"),
    };
    for (mutant, row) in wanted.iter().zip(rows.into_inner().expect("no thread panics")) {
        let (scenario, fitting, any) = row.expect("every mutant was run");
        let _ = writeln!(
            table,
            "| {mutant:?} | {scenario:?} | {} | {} |",
            cells(&fitting, SEEDS_MAX),
            cells(&any, ANY_MAX)
        );
        if fitting.is_none() {
            missed.push(*mutant);
        }
    }
    println!("\n{table}");
    assert!(missed.is_empty(), "not caught within {SEEDS_MAX} seeds: {missed:?}");
}
