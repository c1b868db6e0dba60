//! Runs of whole clusters by seed. `TORUS_SIM_SEED=N` repeats one, `TORUS_SIM_SEEDS=N` explores so many.

use torus_sim::cluster::{Coverage, Plan, run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn clusters_keep_every_promise() {
    let only = number("TORUS_SIM_SEED");
    let from = only.or(number("TORUS_SIM_FROM")).unwrap_or(1);
    let count = if only.is_some() { 1 } else { number("TORUS_SIM_SEEDS").unwrap_or(50) };
    let mut all = Coverage::default();
    for seed in from..from + count {
        match run(seed, Plan::drawn) {
            Ok(coverage) => all.add(&coverage),
            Err(failure) => {
                panic!("{failure}\nrepeat it with: TORUS_SIM_SEED={seed} cargo test -p torus-sim --test cluster -- --nocapture")
            }
        }
    }
    println!("{all:#?}");
}
