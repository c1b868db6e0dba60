//! The proof of the extent store: histories by seed on a simulated disk, with a crash after every disk request begun or
//! ended, and everything that was acknowledged looked for after each.
#![allow(clippy::cast_possible_truncation, reason = "numbers of a simulation are small")]

mod damage;
mod model;
#[cfg(mutants)]
mod mutants;
mod world;

use self::world::{Coverage, Lab, Plan, World};
use super::format::JOURNAL_BLOCKS_MIN;
use super::simulated::{Faults, Rng};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Says how to repeat the history that failed.
struct Repeat(&'static str, u64);

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Repeat(test, seed) = self;
            println!("repeat it with: TORUS_STORE_SEED={seed} cargo test -p torus-dataplane --lib {test}");
        }
    }
}

/// Runs histories until so many crash points were explored, or the one history of `TORUS_STORE_SEED`.
fn explore(test: &'static str, crash_points: u64, plan: impl Fn(&mut Rng) -> Plan) -> Option<Lab> {
    let mut lab = Lab::default();
    let only = number("TORUS_STORE_SEED");
    let factor = number("TORUS_STORE_FACTOR").unwrap_or(1);
    let mut seed = only.or(number("TORUS_STORE_FROM")).unwrap_or(1);
    loop {
        let repeat = Repeat(test, seed);
        let (plan, rng) = planned(seed, &plan);
        if only.is_some() {
            println!("{plan:?}");
        }
        history(&plan, rng, &mut lab);
        drop(repeat);
        seed += 1;
        if only.is_some() || lab.coverage.crash_points >= crash_points * factor {
            break;
        }
    }
    println!("{test}: {:#?}", lab.coverage);
    only.is_none().then_some(lab)
}

/// The plan of a seed, and what the seed goes on with.
fn planned(seed: u64, plan: impl Fn(&mut Rng) -> Plan) -> (Plan, Rng) {
    let mut rng = Rng::new(seed);
    (plan(&mut rng), rng)
}

/// Runs one history, with all of its crashes.
fn history(plan: &Plan, mut rng: Rng, lab: &mut Lab) {
    let mut world = World::fresh(plan, rng.next(), lab);
    world.run(lab);
    world.finish(lab);
    lab.coverage.histories += 1;
}

fn plan(rng: &mut Rng) -> Plan {
    Plan {
        shards: 1 + rng.below(3) as u16,
        slots: 3 + rng.below(8) as u32,
        journal_blocks: [10, 16, 24, 40][rng.index(4)],
        active_max: 1 + rng.below(4) as u32,
        atomic: false,
        flushes: rng.one_in(2),
        replicated: 0,
        chunks: [32, 96, 600][rng.index(3)],
        longest: [3, 8, 40][rng.index(3)],
        writes: 1,
        longs: 24,
        within: 6,
        varied: 6,
        objects: 1 + rng.below(4) as u32,
        extents: 1 + rng.below(3) as u32,
        steps: 100 + rng.below(200) as u32,
        concurrent: 1 + rng.index(32),
        scrub: rng.one_in(2),
        unmaps: [0, 10, 30][rng.index(3)],
        persists: 16,
        faults: Faults::default(),
        nest: 40,
        nest_telling: 40,
        leaves_alone: false,
    }
}

#[test]
fn a_sole_copy_survives_every_crash() {
    let Some(lab) = explore("a_sole_copy_survives_every_crash", 35_000, plan) else { return };
    let Coverage { recoveries, second_crashes, third_crashes, crashes_in_recovery, checkpoints, .. } =
        lab.coverage;
    lab.covers(&[
        ("recoveries", recoveries, 35_000),
        ("second crashes", second_crashes, 4000),
        ("third crashes", third_crashes, 1000),
        ("crashes in recovery", crashes_in_recovery, 2000),
        ("checkpoints", checkpoints, 800),
        ("journals around their end", lab.coverage.wrapped, 8000),
        ("torn tails", lab.coverage.torn_tails, 1000),
        ("blocks put in place again", lab.coverage.replaced_blocks, 50_000),
        ("writes that wait for a slot", lab.coverage.starved, 50),
        ("partial blocks", lab.coverage.merges, 1500),
        ("full stores", lab.coverage.no_space, 100),
        ("growths", lab.coverage.growths, 30),
        ("closes", lab.coverage.closes, 200),
        ("scrubs that go on", lab.coverage.resumed_scrubs, 1),
        ("acknowledged writes", lab.coverage.acknowledged, 3000),
        ("reads", lab.coverage.reads, 8000),
        ("digests", lab.coverage.digests, 1000),
        ("blocks in digests", lab.coverage.digested_data, 1000),
        ("blocks in digests that wait for their place", lab.coverage.digests_of_pending, 60),
        ("absent blocks in digests", lab.coverage.digested_absent, 500),
        ("lost blocks in digests", lab.coverage.digested_lost, 4000),
        ("salvages", lab.coverage.salvages, 400),
        ("lost blocks", lab.coverage.lost, 30_000),
        ("lost blocks whose data had not been put in place", lab.coverage.loses_of_pending, 20),
        ("lost blocks found after a crash", lab.coverage.found_lost, 1_000_000),
        ("refused reads of lost blocks", lab.coverage.refused_lost_reads, 50_000),
        ("refused merges into lost blocks", lab.coverage.refused_lost_merges, 500),
        ("lost blocks made whole", lab.coverage.lost_made_whole, 800),
        ("reserved extents", lab.coverage.reserved, 200),
        ("extents reserved again", lab.coverage.reserved_again, 500),
        ("reserves of full stores", lab.coverage.refused_reserves, 100),
        ("reserves that wait for a slot", lab.coverage.starved_reserves, 15),
    ]);
}

#[test]
fn a_copy_written_in_place_is_right_or_suspect_after_every_crash() {
    let test = "a_copy_written_in_place_is_right_or_suspect_after_every_crash";
    let lab = explore(test, 35_000, |rng| {
        let atomic = rng.below(4) > 0;
        let plan = plan(rng);
        if rng.one_in(3) {
            // Many regions in a small log: one leaves it in the batch that another one comes with.
            let active_max = 4 + rng.below(5) as u32;
            let concurrent = 1 + rng.index(active_max as usize);
            let (shards, slots, objects, extents) = (1, 26, 10, 1);
            let (replicated, longest) = (8, 3);
            return Plan {
                atomic,
                replicated,
                longest,
                active_max,
                concurrent,
                shards,
                slots,
                objects,
                extents,
                unmaps: 0,
                ..plan
            };
        }
        Plan {
            atomic,
            replicated: 2 + rng.below(7),
            active_max: 1 + rng.below(8) as u32,
            longest: plan.longest.min(8),
            ..plan
        }
    });
    let Some(lab) = lab else { return };
    lab.covers(&[
        ("recoveries", lab.coverage.recoveries, 35_000),
        ("writes in place", lab.coverage.in_place, 1000),
        ("suspect regions", lab.coverage.suspect_regions, 30_000),
        ("activity logs that had to grow", lab.coverage.grown_logs, 500),
        ("suspect blocks", lab.coverage.suspect_blocks, 1500),
        ("suspect blocks in digests", lab.coverage.digested_suspect, 25),
        ("suspect blocks salvaged", lab.coverage.salvaged_suspects, 15),
        ("suspect blocks made whole", lab.coverage.suspects_made_whole, 10),
        ("lists of extents", lab.coverage.lists, 3000),
        ("extents listed", lab.coverage.listed, 4000),
        ("pieces of lists", lab.coverage.list_pieces, 3500),
        ("regions surveyed", lab.coverage.surveyed_active, 3000),
        ("layers whose extents were looked for", lab.coverage.inventories_after_crash, 35_000),
        ("refused merges", lab.coverage.refused_merges, 10),
        ("closed without a suspect", lab.coverage.settled, 200),
        ("torn tails", lab.coverage.torn_tails, 300),
    ]);
}

#[test]
fn what_replicas_must_not_forget_survives_every_crash() {
    let lab = explore("what_replicas_must_not_forget_survives_every_crash", 40_000, |rng| {
        let plan = plan(rng);
        Plan {
            shards: 1 + rng.below(2) as u16,
            persists: 4,
            slots: 8 + rng.below(4) as u32,
            objects: 1 + rng.below(4) as u32,
            extents: 1 + rng.below(2) as u32,
            unmaps: 3 + rng.below(5),
            replicated: 6 + rng.below(3),
            atomic: rng.one_in(2),
            longest: plan.longest.min(8),
            concurrent: 1 + rng.index(12),
            ..plan
        }
    });
    let Some(lab) = lab else { return };
    lab.covers(&[
        ("states kept", lab.coverage.persisted, 500),
        ("states that had no room", lab.coverage.refused_persists, 40),
        ("states found after a crash", lab.coverage.states_after_crash, 10_000),
        ("states that were not known to be durable", lab.coverage.newer_states, 200),
        ("states that ended", lab.coverage.forgotten, 20),
        ("layers whose version was held against what it was", lab.coverage.versions_after_crash, 10_000),
        ("layers none of whose extents has their version", lab.coverage.versions_of_gone, 500),
        ("extents seen to be hollow", lab.coverage.hollow, 20),
        ("hollow extents found after a crash", lab.coverage.hollow_after_crash, 2000),
        ("hollow extents that may go", lab.coverage.released, 300),
        ("hollow extents that are to stay", lab.coverage.kept_hollow, 20),
        ("journals around their end", lab.coverage.wrapped, 1000),
    ]);
}

#[test]
fn slots_that_change_hands_survive_every_crash() {
    let lab = explore("slots_that_change_hands_survive_every_crash", 20_000, |rng| {
        let plan = plan(rng);
        Plan {
            shards: 2 + rng.below(2) as u16,
            slots: 2 + rng.below(4) as u32,
            objects: 4,
            extents: 2,
            unmaps: 3 + rng.below(4),
            concurrent: 1 + rng.index(6),
            atomic: rng.one_in(2),
            replicated: rng.below(2) * 4,
            steps: 400,
            ..plan
        }
    });
    let Some(lab) = lab else { return };
    lab.covers(&[
        ("slots taken by another shard", lab.coverage.moved_slots, 100),
        ("unmaps", lab.coverage.unmaps, 250),
        ("unmaps of ranges", lab.coverage.trims, 250),
        ("writes that wait for a slot", lab.coverage.starved, 20),
    ]);
}

/// Streams, mostly: runs that go beside the journal, in extents with two slots and back to one, in stores that are full of them.
fn runs(rng: &mut Rng) -> Plan {
    let plan = plan(rng);
    let (objects, extents) = (1 + rng.below(2) as u32, 1 + rng.below(2) as u32);
    if rng.one_in(4) {
        // Extents that enter and leave the activity log, one at a time: in place and beside the journal by turns.
        return Plan {
            shards: 1,
            objects: 3,
            extents: 1,
            slots: 7,
            active_max: 1,
            atomic: true,
            replicated: 3,
            longest: 5,
            longs: 2,
            unmaps: [0, 8][rng.index(2)],
            concurrent: 1 + rng.index(5),
            persists: 60,
            ..plan
        };
    }
    Plan {
        shards: 1 + rng.below(2) as u16,
        objects,
        extents,
        // From too few for all extents to enough for two each.
        slots: objects * extents + 1 + rng.below(u64::from(2 + objects * extents)) as u32,
        chunks: [60, 96, 600][rng.index(3)],
        longest: [6, 12, 24][rng.index(3)],
        longs: 1 + rng.below(6),
        concurrent: 1 + rng.index(10),
        replicated: [0, 0, 0, 1][rng.index(4)],
        atomic: rng.one_in(2),
        unmaps: [0, 12, 24][rng.index(3)],
        persists: 60,
        ..plan
    }
}

/// The same few blocks all the time, of a sole copy and of one of several by turns: beside the journal, into it and in place, and again
/// soon after a crash.
fn turns(rng: &mut Rng) -> Plan {
    let plan = plan(rng);
    Plan {
        shards: 1,
        objects: 1,
        extents: 1,
        slots: 2 + rng.below(2) as u32,
        active_max: 1 + rng.below(2) as u32,
        atomic: true,
        replicated: 3 + rng.below(3),
        chunks: 96,
        writes: 2 + rng.below(4),
        longest: 3 + rng.below(4),
        longs: 1 + rng.below(2),
        within: 1 + rng.below(3),
        concurrent: 1 + rng.index(4),
        unmaps: [0, 30][rng.index(2)],
        persists: 60,
        nest: 60,
        nest_telling: 6,
        ..plan
    }
}

/// Torn last batches of a shard that is left alone then, while others take the slots that it was giving its extents, and write the same.
fn torn(rng: &mut Rng) -> Plan {
    let plan = plan(rng);
    let extents = 1 + rng.below(2) as u32;
    Plan {
        shards: 2,
        objects: 2,
        extents,
        slots: 2 * extents + rng.below(2) as u32,
        atomic: rng.one_in(2),
        chunks: 96,
        longest: 3 + rng.below(4),
        longs: 1,
        within: 1 + rng.below(2),
        varied: 1 + rng.below(3),
        concurrent: 1 + rng.index(4),
        unmaps: [6, 10, 16][rng.index(3)],
        persists: 200,
        nest_telling: 3,
        leaves_alone: true,
        ..plan
    }
}

#[test]
fn runs_beside_the_journal_survive_every_crash() {
    let lab = explore("runs_beside_the_journal_survive_every_crash", 30_000, runs);
    let Some(lab) = lab else { return };
    lab.covers(&[
        ("blocks beside the journal", lab.coverage.redirected, 3500),
        ("blocks to a second slot", lab.coverage.redirected_to_twins, 1200),
        ("slots that became vacant", lab.coverage.vacated, 150),
        ("blocks moved to the other slot", lab.coverage.moved_blocks, 700),
        ("blocks without data moved", lab.coverage.moved_states, 20),
        ("extents with two slots found after a crash", lab.coverage.twins_after_crash, 4000),
        ("ones in the activity log", lab.coverage.active_twins_after_crash, 100),
        ("torn tails", lab.coverage.torn_tails, 1000),
        ("full stores", lab.coverage.no_space, 5),
        ("checkpoints", lab.coverage.checkpoints, 500),
    ]);
}

/// A sole copy's blocks and those of one of several by turns, in one extent.
#[test]
fn blocks_written_in_every_way_survive_every_crash() {
    let Some(lab) = explore("blocks_written_in_every_way_survive_every_crash", 25_000, turns) else { return };
    lab.covers(&[
        ("blocks beside the journal", lab.coverage.redirected, 600),
        ("blocks to a second slot", lab.coverage.redirected_to_twins, 400),
        ("writes in place", lab.coverage.in_place, 1500),
        ("second crashes", lab.coverage.second_crashes, 4000),
        ("extents with two slots in the activity log", lab.coverage.active_twins_after_crash, 1000),
    ]);
}

#[test]
fn torn_batches_of_shards_at_rest_stay_torn() {
    let Some(lab) = explore("torn_batches_of_shards_at_rest_stay_torn", 15_000, torn) else { return };
    lab.covers(&[
        ("torn tails", lab.coverage.torn_tails, 400),
        ("second crashes", lab.coverage.second_crashes, 4000),
        ("slots taken by another shard", lab.coverage.moved_slots, 20),
    ]);
}

#[test]
fn long_writes_and_scarce_memory_survive_every_crash() {
    let lab = explore("long_writes_and_scarce_memory_survive_every_crash", 8000, |rng| {
        let plan = plan(rng);
        if rng.one_in(3) {
            let journal_blocks = JOURNAL_BLOCKS_MIN;
            return Plan {
                journal_blocks,
                longest: 256,
                chunks: 2000,
                concurrent: 8,
                steps: 60,
                nest: 200,
                ..plan
            };
        }
        Plan { chunks: 12 + rng.below(3) as u32 * 6, concurrent: 32, longest: 6, ..plan }
    });
    let Some(lab) = lab else { return };
    lab.covers(&[("long writes", lab.coverage.long, 20), ("no memory", lab.coverage.no_memory, 5)]);
}

#[test]
fn what_a_device_does_wrong_is_found_and_named() {
    let lab = explore("what_a_device_does_wrong_is_found_and_named", 15_000, |rng| {
        let rate = 5 + rng.below(100);
        let mut faults = Faults::default();
        for _ in 0..1 + rng.below(2) {
            let rate_of = match rng.below(8) {
                0 => &mut faults.read,
                1 => &mut faults.write,
                2 => &mut faults.sync,
                3 => &mut faults.no_space,
                4 => &mut faults.stale,
                5 => &mut faults.lost,
                6 => &mut faults.gone,
                _ => &mut faults.rot,
            };
            *rate_of = rate;
        }
        let atomic = rng.one_in(2);
        let replicated = if rng.one_in(2) { 4 } else { 0 };
        Plan { faults, atomic, replicated, ..plan(rng) }
    });
    let Some(lab) = lab else { return };
    lab.covers(&[("faults", lab.coverage.faults, 50), ("named errors", lab.coverage.named_errors, 100)]);
}

#[test]
fn a_block_that_rots_is_noticed_or_not_needed() {
    let test = "a_block_that_rots_is_noticed_or_not_needed";
    damage(test, 40, damage::rot_everywhere);
}

#[test]
fn nonsense_on_the_device_is_an_error_and_no_panic() {
    damage("nonsense_on_the_device_is_an_error_and_no_panic", 40, damage::nonsense);
}

#[test]
fn a_batch_that_does_not_follow_is_not_applied() {
    damage("a_batch_that_does_not_follow_is_not_applied", 40, damage::strangers);
}

fn damage(test: &'static str, histories: u64, what: fn(&Plan, u64, &mut Lab)) {
    let mut lab = Lab::default();
    let only = number("TORUS_STORE_SEED");
    let from = only.or(number("TORUS_STORE_FROM")).unwrap_or(1);
    let count = if only.is_some() { 1 } else { histories * number("TORUS_STORE_FACTOR").unwrap_or(1) };
    for seed in from..from + count {
        let repeat = Repeat(test, seed);
        let mut rng = Rng::new(seed);
        let plan = Plan { longest: 8, ..plan(&mut rng) };
        what(&plan, rng.next(), &mut lab);
        lab.coverage.histories += 1;
        drop(repeat);
    }
    println!("{test}: {:#?}", lab.coverage);
    assert!(
        only.is_some() || lab.coverage.recoveries > 20 * histories,
        "little was tried: {:?}",
        lab.coverage
    );
}
