//! Clusters of real heads and replicas, by seed: every promise is kept through whatever breaks.

use torus_sim::cluster::{Coverage, Plan, run};
use torus_sim::exploration::{Exploration, Ran};

#[test]
fn clusters_keep_every_promise() {
    let command = "cargo test -p torus-sim --test replication";
    let mut all = Coverage::default();
    let explored = Exploration::from_environment(command, 200).run(|seed| {
        let (coverage, digest) = run(seed, Plan::drawn).map_err(|failure| failure.to_string())?;
        all.add(&coverage);
        Ok(Ran { simulated_ns: coverage.simulated_ns, events: coverage.events, digest })
    });
    match explored {
        Ok(explored) => println!("{explored}\n{all:#?}"),
        Err(failed) => panic!("{failed}"),
    }
}
