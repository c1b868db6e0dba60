//! `torus-relay ONE OTHER LOSS DELAY-MS SEED`: a bad wire between two interfaces.
//!
//! Carries every AoE frame from one to the other, both ways; loses each with the probability LOSS/1000 and holds the others
//! back for 0 to DELAY-MS milliseconds, each for a time of its own, so that frames overtake one another. Runs until
//! killed; says once a second how many it carried and lost.
#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use torus_e2e::port::Port;
use torus_e2e::random::Random;

/// How long it sleeps between two looks at its interfaces: less than any delay that matters.
const PAUSE: Duration = Duration::from_micros(200);
/// Frames held back at most; more are lost, as in a switch.
const HELD_MAX: usize = 4096;

/// A frame and when it leaves; the number keeps frames of one instant in order.
type Held = Reverse<(Instant, u64, Vec<u8>)>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [one, other, loss, delay_ms, seed] = arguments.as_slice() else {
        bail!("write torus-relay ONE OTHER LOSS-PER-MILLE DELAY-MS SEED");
    };
    let loss: usize = loss.parse().context("LOSS is a number of frames in a thousand")?;
    let delay_ms: usize = delay_ms.parse().context("DELAY-MS is a number of milliseconds")?;
    let mut random = Random::new(seed.parse().context("SEED is a number")?);
    let mut ports = [Port::open(one)?, Port::open(other)?];
    // By the port that they leave from.
    let mut held: [BinaryHeap<Held>; 2] = [BinaryHeap::new(), BinaryHeap::new()];
    let (mut carried, mut lost, mut number) = (0u64, 0u64, 0u64);
    let mut said = Instant::now();
    loop {
        let now = Instant::now();
        for from in 0..2 {
            let queue = &mut held[1 - from];
            ports[from].receive(|frame| {
                if random.below(1000) < loss || queue.len() >= HELD_MAX {
                    lost += 1;
                    return;
                }
                let delay_us = u64::try_from(random.below(delay_ms * 1000 + 1)).expect("small");
                number += 1;
                queue.push(Reverse((now + Duration::from_micros(delay_us), number, frame.to_vec())));
            });
        }
        for (port, queue) in ports.iter_mut().zip(&mut held) {
            while queue.peek().is_some_and(|Reverse((when, ..))| *when <= now) {
                let Reverse((_, _, frame)) = queue.pop().expect("just seen");
                // A frame that the other side does not take is lost, as on a wire.
                if port.send(&frame).is_ok() {
                    carried += 1;
                } else {
                    lost += 1;
                }
            }
        }
        if said.elapsed() >= Duration::from_secs(1) {
            println!("carried {carried}, lost {lost}");
            said = Instant::now();
        }
        sleep(PAUSE);
    }
}
