//! What it costs to hand a request to the core that owns its export, and a chunk back, in nanoseconds for each message.
//!
//! Two threads take turns: one queues a batch, then the other takes it out, so that every message crosses between their
//! caches. Time is CPU time of each thread in its own part; waiting for the turn is not counted, waking a sleeper neither.
//! Prints one line for each direction, the medians of several rounds.
//!
//! `cargo bench -p torus-bench --bench handover`
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use af_xdp::region::{Pool, Region, RegionConfig};
use aoe_xdp::link::{Chunk, RxFrame, Segment, Segments};
use rustix::time::{ClockId, clock_gettime};
use torus_dataplane::exchange::{Mailbox, Message};

/// Messages of one turn: a few receive batches.
const BATCH: usize = 256;
const TURNS: usize = 400;
const ROUNDS: usize = 15;

fn cpu_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

/// CPU time of queueing and of taking out, for each message, in tenths of a nanosecond.
#[derive(Clone, Copy, Default)]
struct Cost {
    queue: u64,
    take: u64,
}

/// Waits for a step of the play.
fn await_step(step: &AtomicUsize, wanted: usize) {
    while step.load(Ordering::Acquire) != wanted {
        std::thread::yield_now();
    }
}

/// The owner of the exports: takes requests out, and gives their chunks back.
fn owner(step: &AtomicUsize, own: &Mailbox, other: &Mailbox) -> (u64, u64) {
    let mut chunks: Vec<Chunk> = Vec::with_capacity(BATCH);
    let (mut serve_ns, mut back_ns) = (0, 0);
    for turn in 0..TURNS {
        await_step(step, 2 * turn + 1);
        let before = cpu_ns();
        while let Some(Message::Serve { frame, .. }) = own.receive() {
            chunks.extend(frame.into_segments().into_iter().map(|segment| segment.chunk));
        }
        let between = cpu_ns();
        for chunk in chunks.drain(..) {
            other.send(Message::TakeBack(chunk)).unwrap();
        }
        serve_ns += between - before;
        back_ns += cpu_ns() - between;
        step.store(2 * turn + 2, Ordering::Release);
    }
    (serve_ns, back_ns)
}

/// The core that receives.
fn receiver(step: &AtomicUsize, own: &Mailbox, other: &Mailbox, pool: &mut Pool) -> (u64, u64) {
    let mut frames: Vec<RxFrame> = Vec::with_capacity(BATCH);
    let (mut serve_ns, mut back_ns) = (0, 0);
    for turn in 0..TURNS {
        for _ in 0..BATCH {
            let mut segments = Segments::new();
            let chunk = pool.take_chunk().unwrap();
            segments.push(Segment { chunk, offset: 476, len: 1060 }).unwrap();
            frames.push(RxFrame::new(segments));
        }
        let before = cpu_ns();
        for frame in frames.drain(..) {
            other.send(Message::Serve { interface: 0, frame }).unwrap();
        }
        serve_ns += cpu_ns() - before;
        step.store(2 * turn + 1, Ordering::Release);
        await_step(step, 2 * turn + 2);
        let before = cpu_ns();
        while let Some(Message::TakeBack(chunk)) = own.receive() {
            pool.release(chunk);
        }
        back_ns += cpu_ns() - before;
    }
    (serve_ns, back_ns)
}

fn round() -> (Cost, Cost) {
    let region = Region::new(RegionConfig { cores: 1, chunks_per_core: 1024, headers_per_core: 64 }).unwrap();
    let mut pool = region.pool(0).unwrap();
    let step = Arc::new(AtomicUsize::new(0));
    let boxes: Arc<[Mailbox; 2]> = Arc::new([Mailbox::new().unwrap(), Mailbox::new().unwrap()]);
    let at_owner = {
        let (step, boxes) = (Arc::clone(&step), Arc::clone(&boxes));
        std::thread::spawn(move || owner(&step, &boxes[1], &boxes[0]))
    };
    let (serve_queue, back_take) = receiver(&step, &boxes[0], &boxes[1], &mut pool);
    let (serve_take, back_queue) = at_owner.join().unwrap();
    assert_eq!(pool.free_chunks(), pool.chunk_capacity(), "every chunk is back");
    let each = |ns: u64| ns * 10 / (BATCH * TURNS) as u64;
    (
        Cost { queue: each(serve_queue), take: each(serve_take) },
        Cost { queue: each(back_queue), take: each(back_take) },
    )
}

fn median(mut values: Vec<u64>) -> f64 {
    values.sort_unstable();
    f64::from(u32::try_from(values[values.len() / 2]).unwrap()) / 10.0
}

fn main() {
    let rounds: Vec<_> = (0..ROUNDS).map(|_| round()).collect();
    let line = |name: &str, of: fn(&(Cost, Cost)) -> Cost| {
        let queue = median(rounds.iter().map(|round| of(round).queue).collect());
        let take = median(rounds.iter().map(|round| of(round).take).collect());
        println!("{name:<24} {queue:>6.1} ns to queue, {take:>6.1} ns to take out");
    };
    line("a request to its owner", |round| round.0);
    line("a chunk back", |round| round.1);
}
