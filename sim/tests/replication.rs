//! Clusters of real heads and replicas, by seed: every promise is kept through whatever breaks. `TORUS_SIM_SCENARIO` names the only kind
//! of run.

use torus_sim::cluster::scenarios::Scenario;
use torus_sim::cluster::{Coverage, run};
use torus_sim::exploration::{Exploration, Ran};

/// Every other seed is any run, and the scenarios share the rest.
fn scenario(seed: u64) -> Scenario {
    let only = std::env::var("TORUS_SIM_SCENARIO").ok();
    if let Some(only) = Scenario::ALL.into_iter().find(|scenario| Some(format!("{scenario:?}")) == only) {
        return only;
    }
    let directed = &Scenario::ALL[1..];
    if seed.is_multiple_of(2) {
        Scenario::Any
    } else {
        directed[usize::try_from(seed / 2 % directed.len() as u64).expect("a small number")]
    }
}

/// Seeds of each part: the parts run side by side.
const SEEDS: u64 = 500;

fn explore(part: u64) {
    let command = "cargo test -p torus-sim --test replication";
    let mut all = Coverage::default();
    let explored = Exploration::part_from_environment(command, SEEDS, part).run(|seed| {
        let scenario = scenario(seed);
        let (coverage, digest) = run(seed, |random| scenario.plan(random))
            .map_err(|failure| format!("{scenario:?}, found by {}: {failure}", failure.checker))?;
        all.add(&coverage);
        Ok(Ran { simulated_ns: coverage.simulated_ns, events: coverage.events, digest })
    });
    match explored {
        Ok(explored) => println!("{explored}\n{all:#?}"),
        Err(failed) => panic!("{failed}"),
    }
}

#[test]
fn clusters_keep_every_promise() {
    explore(0);
}

#[test]
fn clusters_keep_every_promise_in_more_runs() {
    explore(1);
}

#[test]
fn clusters_keep_every_promise_in_still_more_runs() {
    explore(2);
}

#[test]
fn clusters_keep_every_promise_in_the_last_runs() {
    explore(3);
}
