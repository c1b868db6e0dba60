//! How the owner of a queue knows what other cores have taken out of it.
//!
//! Invariant: the owner never counts fewer chunks with the kernel than there are. Nothing else is published by the count:
//! the chunks themselves go home another way. A late look sees too many, and the next look is right.
//!
//! Built on loom's types under `--cfg loom`, which checks just this.
#![cfg_attr(loom, allow(dead_code, reason = "the model uses a part"))]

use crate::ring::{AtomicU32, Ordering};

/// How many chunks a lane has taken out of its ring, ever, modulo 2³²: written by the lane's core, read by the queue's owner.
/// On a cache line of its own, which changes once for each batch.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Taken(AtomicU32);

impl Taken {
    pub(crate) fn load(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// The lane's core alone calls this, after it has taken them.
    pub(crate) fn add(&self, chunks: u32) {
        self.0.store(self.load().wrapping_add(chunks), Ordering::Relaxed);
    }
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::sync::Arc;

    /// The owner gives three chunks, one by one; a lane takes out what it finds, as the kernel passes it on.
    #[test]
    fn model_the_owner_never_counts_too_few() {
        loom::model(|| {
            let passed = Arc::new(AtomicU32::new(0));
            let taken = Arc::new(Taken::default());
            let lane = {
                let (passed, taken) = (passed.clone(), taken.clone());
                loom::thread::spawn(move || {
                    let mut out = 0;
                    for _ in 0..2 {
                        let there = passed.load(Ordering::Acquire);
                        taken.add(there - out);
                        out = there;
                    }
                    out
                })
            };
            let mut given = 0u32;
            for _ in 0..3 {
                given += 1;
                passed.store(given, Ordering::Release);
                let held = given.wrapping_sub(taken.load());
                assert!(held <= given, "no more were taken than given");
            }
            let out = lane.join().unwrap();
            assert_eq!(given.wrapping_sub(taken.load()), given - out, "exact once it is looked at again");
        });
    }
}
