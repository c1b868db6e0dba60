//! Shards at work on a simulated disk: requests by the seed, ended disk requests in any order, and a crash at every step.

use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use af_xdp::region::{Pool, Region, RegionConfig};
use torus_uring::Blocks;

use crate::store::extent::extents::{FoldMap, FreeSlot};
use crate::store::extent::format::{EPOCHS_MAX, EXTENT_BLOCKS, Epochs, ReplicaState, Sum, Superblock};
use crate::store::extent::recovery::{self, Image, RecoveryError};
use crate::store::extent::shard::{
    BlockDigest, Copies, SHARD_MASK, SHARD_SHIFT, ScrubTask, Shard, WriteTerms,
};
use crate::store::extent::shared::{ShardEvent, Shared};
use crate::store::extent::simulated::{
    Faults, Form, Media, Rng, SECTOR, SimDisk, Still, make_shards, read_shards,
};
use crate::store::{BLOCK_BYTES, Crcs, EXTENT_BYTES, Outcome, RequestToken, StoreError, release_blocks};

use super::model::{Held, Kept, Key, Model, Presences, SECTORS, Values, fill, values_of};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// So few blocks that requests of the same ones follow each other.
const FEW: u64 = 3;

/// What has been explored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Coverage {
    pub(super) histories: u64,
    pub(super) crash_points: u64,
    pub(super) power_cuts: u64,
    pub(super) second_crashes: u64,
    pub(super) third_crashes: u64,
    pub(super) crashes_in_recovery: u64,
    pub(super) recoveries: u64,
    pub(super) checkpoints: u64,
    pub(super) wrapped: u64,
    pub(super) grown_logs: u64,
    pub(super) torn_tails: u64,
    pub(super) replaced_blocks: u64,
    pub(super) suspect_regions: u64,
    pub(super) suspect_blocks: u64,
    pub(super) starved: u64,
    pub(super) merges: u64,
    pub(super) refused_merges: u64,
    pub(super) moved_slots: u64,
    pub(super) no_space: u64,
    pub(super) no_memory: u64,
    pub(super) growths: u64,
    pub(super) closes: u64,
    pub(super) resumed_scrubs: u64,
    pub(super) settled: u64,
    pub(super) acknowledged: u64,
    pub(super) reads: u64,
    pub(super) long: u64,
    pub(super) in_place: u64,
    pub(super) unmaps: u64,
    pub(super) trims: u64,
    pub(super) faults: u64,
    pub(super) named_errors: u64,
    pub(super) refused_opens: u64,
    pub(super) lists: u64,
    pub(super) listed: u64,
    pub(super) list_pieces: u64,
    pub(super) surveyed_active: u64,
    pub(super) inventories_after_crash: u64,
    pub(super) reserves: u64,
    pub(super) reserved: u64,
    pub(super) reserved_again: u64,
    pub(super) refused_reserves: u64,
    pub(super) starved_reserves: u64,
    pub(super) loses: u64,
    pub(super) loses_of_pending: u64,
    pub(super) lost: u64,
    pub(super) found_lost: u64,
    pub(super) refused_lost_reads: u64,
    pub(super) refused_lost_merges: u64,
    pub(super) lost_made_whole: u64,
    pub(super) digests: u64,
    pub(super) digests_of_pending: u64,
    pub(super) digested_absent: u64,
    pub(super) digested_data: u64,
    pub(super) digested_suspect: u64,
    pub(super) digested_bad: u64,
    pub(super) digested_lost: u64,
    pub(super) suspects_made_whole: u64,
    pub(super) salvages: u64,
    pub(super) salvaged_suspects: u64,
    pub(super) persisted: u64,
    pub(super) refused_persists: u64,
    pub(super) states_after_crash: u64,
    /// Found after a crash, and not known to be durable before.
    pub(super) newer_states: u64,
    pub(super) forgotten: u64,
    pub(super) versions_after_crash: u64,
    /// Of layers none of whose extents has it.
    pub(super) versions_of_gone: u64,
    pub(super) hollow: u64,
    pub(super) hollow_after_crash: u64,
    pub(super) released: u64,
    pub(super) kept_hollow: u64,
    pub(super) redirected: u64,
    pub(super) redirected_to_twins: u64,
    pub(super) moved_blocks: u64,
    pub(super) moved_states: u64,
    pub(super) failed_moves: u64,
    pub(super) vacated: u64,
    /// Extents with two slots, found after a crash.
    pub(super) twins_after_crash: u64,
    pub(super) hollow_twins_after_crash: u64,
    pub(super) active_twins_after_crash: u64,
}

/// What a history is like.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) shards: u16,
    pub(super) slots: u32,
    pub(super) journal_blocks: u32,
    pub(super) active_max: u32,
    pub(super) atomic: bool,
    /// Batches with data beside them are made durable by a sync.
    pub(super) flushes: bool,
    /// Of 8, how many writes have another copy.
    pub(super) replicated: u64,
    pub(super) chunks: u32,
    pub(super) longest: u64,
    /// By so much requests that are no writes are rarer.
    pub(super) writes: u64,
    /// Of so many requests one is as long as that.
    pub(super) longs: u64,
    /// Three of four requests begin in so many blocks of an extent, the others near its end; all of them where these are few.
    pub(super) within: u64,
    /// Of so many writes one is of the same bytes everywhere, and one of zeros.
    pub(super) varied: u64,
    pub(super) objects: u32,
    pub(super) extents: u32,
    pub(super) steps: u32,
    pub(super) concurrent: usize,
    pub(super) scrub: bool,
    /// Of so many requests one is an unmap; 0 for none.
    pub(super) unmaps: u64,
    /// Of so many requests one is for a replica's state to be kept.
    pub(super) persists: u64,
    pub(super) faults: Faults,
    /// Of so many crash points one is gone on from.
    pub(super) nest: u64,
    /// Of so many of those that leave a last batch which is torn, or names what went beside the journal.
    pub(super) nest_telling: u64,
    /// The shard of a torn one is left alone then, mostly, while others go on.
    pub(super) leaves_alone: bool,
}

impl Plan {
    pub(super) fn layout(&self) -> Superblock {
        let Plan { shards, slots, journal_blocks, active_max, .. } = *self;
        Form { shards, slots, journal_blocks, active_max }.layout(cluster_map::StoreId([3; 16])).unwrap()
    }
}

/// Pools that no world has: making one takes longer than a short history.
#[derive(Debug, Default)]
pub(super) struct Pools(FoldMap<u32, Vec<Pool>>);

impl Pools {
    fn take(&mut self, chunks: u32) -> Pool {
        self.0.entry(chunks).or_default().pop().unwrap_or_else(|| {
            let config = RegionConfig { cores: 1, chunks_per_core: chunks, headers_per_core: 1 };
            Region::new(config).unwrap().pool(0).unwrap()
        })
    }

    fn give(&mut self, pool: Pool) {
        assert_eq!(pool.free_chunks(), pool.chunk_capacity(), "every chunk came back");
        self.0.entry(pool.chunk_capacity() as u32).or_default().push(pool);
    }
}

/// What all worlds of a run have in common.
#[derive(Debug, Default)]
pub(super) struct Lab {
    pub(super) pools: Pools,
    pub(super) coverage: Coverage,
}

impl Lab {
    /// A test that explores nothing proves nothing.
    pub(super) fn covers(&self, least: &[(&str, u64, u64)]) {
        for (what, count, least) in least {
            assert!(count >= least, "only {count} {what}: {:#?}", self.coverage);
        }
    }
}

#[derive(Debug)]
enum Doing {
    Read,
    Salvage,
    Digest,
    Write { masks: Vec<u8>, values: Vec<Values>, in_place: bool, version: u64, replicated: bool },
    Reserve { is_there: bool },
    Lose { version: u64, replicated: bool },
    Trim { version: u64, replicated: bool },
    Persist { state: Arc<ReplicaState> },
    Unmap,
}

#[derive(Debug)]
struct Op {
    token: u32,
    object: u32,
    first: u64,
    count: u64,
    doing: Doing,
    /// Not all of its extents were there for certain when it began.
    needs_slots: bool,
    /// Since then extents may have had all slots once, and no more were to come.
    met_full: bool,
}

/// A store after it was opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) images: Vec<Image>,
    pub(super) media: Media,
    pub(super) found: Vec<(Key, Held)>,
}

/// Opens all shards, puts everything in place, and holds what is there against the model.
pub(super) fn open(
    layout: &Superblock,
    media: Media,
    model: &Model,
    excused: &dyn Fn(&Key) -> bool,
    lab: &mut Lab,
    ghost: Option<&mut Rng>,
) -> Result<Result<Opened, RecoveryError<Infallible>>, String> {
    lab.coverage.recoveries += 1;
    let still = Still(RefCell::new(media));
    let images = match read_shards(layout, &still) {
        Ok(images) => images,
        Err(error) => return Ok(Err(error)),
    };
    if let Some(rng) = ghost {
        let mut media = still.0.borrow().clone();
        media.cut(rng);
        lab.coverage.crashes_in_recovery += 1;
        match open(layout, media, model, excused, lab, None)? {
            Ok(_) => {}
            Err(error) => return Err(format!("after a crash while it was opened: {error}")),
        }
    }
    let mut media = still.0.into_inner();
    media.settle();
    for image in &images {
        lab.coverage.torn_tails += u64::from(image.findings.torn_tail);
        lab.coverage.replaced_blocks += image.findings.replaced_blocks;
        lab.coverage.suspect_regions += u64::from(image.findings.suspect_regions);
        let journal = &image.recovered.journal;
        if journal.head >= layout.journal_blocks || journal.tail >= layout.journal_blocks {
            return Err(format!("the journal is nowhere: {journal:?}"));
        }
        lab.coverage.wrapped += u64::from(journal.head < journal.tail);
        let active = image.recovered.extents.iter().filter(|(_, extent)| extent.active).count();
        lab.coverage.grown_logs += u64::from(active > layout.active_max as usize);
        for (_, extent) in image.recovered.extents.iter().filter(|(_, extent)| extent.is_twin()) {
            lab.coverage.twins_after_crash += 1;
            lab.coverage.hollow_twins_after_crash += u64::from(extent.hollow);
            lab.coverage.active_twins_after_crash += u64::from(extent.active);
        }
    }
    let found = examine(layout, &images, &media, model, excused)?;
    lab.coverage.found_lost += found.iter().filter(|(_, held)| *held == Held::Lost).count() as u64;
    lab.coverage.suspect_blocks += found.iter().filter(|(_, held)| *held == Held::Bad).count() as u64;
    Ok(Ok(Opened { images, media, found }))
}

fn examine(
    layout: &Superblock,
    images: &[Image],
    media: &Media,
    model: &Model,
    excused: &dyn Fn(&Key) -> bool,
) -> Result<Vec<(Key, Held)>, String> {
    let free = recovery::free_slots(layout, images.iter()).ok_or("a slot has two owners")?;
    let mut extents = FoldMap::default();
    let (mut data_blocks, mut lost_blocks, mut taken) = (0, 0, 0);
    for (shard, image) in images.iter().enumerate() {
        for (_, extent) in image.recovered.extents.iter() {
            if extent.object as usize % images.len() != shard {
                return Err("an extent is on another shard".into());
            }
            extents.insert((extent.object, extent.number), extent);
            taken += extent.live().count();
            data_blocks += extent.all_sums().filter(|sum| sum.is_data()).count();
            lost_blocks += extent.all_sums().filter(|sum| *sum == Sum::LOST).count();
        }
    }
    if free.len() + taken != layout.slots() as usize {
        return Err(format!("{} slots are free, {taken} are taken", free.len()));
    }
    let mut found = Vec::with_capacity(model.len());
    for (key, known) in model {
        let (number, block) = ((key.1 / u64::from(EXTENT_BLOCKS)) as u32, key.1 % u64::from(EXTENT_BLOCKS));
        let extent = extents.get(&(key.0, number));
        let sum = extent.map_or(Sum::ABSENT, |extent| extent.sum(block as u16));
        let mut suspect = false;
        let held = match extent {
            Some(extent) if sum.is_data() => {
                data_blocks -= 1;
                suspect = extent.suspect;
                let slot = extent.half(extent.half_of(block as u16)).slot;
                let data = media.visible(layout.data_offset(slot) / BLOCK + block);
                let bytes = data.map_or(&[0; BLOCK_BYTES], |data| &**data);
                if Sum::of(bytes) == sum {
                    Held::Values(values_of(bytes).map_err(|error| format!("{key:?}: {error}"))?)
                } else {
                    Held::Bad
                }
            }
            Some(_) if sum == Sum::LOST => {
                lost_blocks -= 1;
                Held::Lost
            }
            _ => Held::Values([0; SECTORS]),
        };
        known
            .check(&held, excused(key))
            .map_err(|error| format!("object {} block {}, extent {number}: {error}", key.0, key.1))?;
        if held == Held::Bad && !suspect && !excused(&(u32::MAX, 0)) {
            return Err(format!("{key:?} is bad and not suspect; known is {known:x?}"));
        }
        found.push((*key, held));
    }
    if data_blocks != 0 {
        return Err(format!("{data_blocks} blocks have data that nobody wrote"));
    }
    // A sum page that is gone takes with it that its other blocks have nothing.
    if lost_blocks != 0 && !excused(&(u32::MAX, 0)) {
        return Err(format!("{lost_blocks} blocks are lost that nobody wrote"));
    }
    Ok(found)
}

/// From which block on a change of these that ended with an error has done nothing for certain.
fn undone_from(blocks: &Range<u64>, error: StoreError) -> u64 {
    let each = u64::from(EXTENT_BLOCKS);
    match error {
        StoreError::Unwritable(_) => blocks.end,
        // Extents get their slots in order, each before anything is done to it. One that had none ended it, so the last has nothing.
        StoreError::NoSpace => (blocks.end - 1) / each * each,
        // What cannot be merged into, or not be read for that, is found out before anything is done.
        StoreError::Corrupt { .. }
        | StoreError::Lost
        | StoreError::Unreadable(_)
        | StoreError::NoMemory
        | StoreError::OutOfRange
        | StoreError::NoHead => blocks.start,
    }
}

/// A running store.
#[derive(Debug)]
pub(super) struct World {
    plan: Plan,
    layout: Arc<Superblock>,
    shared: Arc<Shared>,
    shards: Vec<Shard>,
    pub(super) disk: SimDisk,
    pub(super) model: Model,
    presences: Presences,
    /// What is kept of replicas, by layer.
    kept: FoldMap<u32, Kept>,
    /// The highest version that each layer was seen to have.
    highest: FoldMap<u32, u64>,
    ops: Vec<Op>,
    outcomes: Vec<Outcome>,
    rng: Rng,
    now_ns: u64,
    next_token: u32,
    next_value: u64,
    version: u64,
    /// Slots that are being prepared.
    held_back: Vec<u32>,
    /// Shards that take no more writes.
    failed: bool,
    depth: u32,
    /// Faults were injected before this world began.
    tainted: bool,
    /// The shard that each slot was seen with last.
    owners: FoldMap<u32, usize>,
    /// A shard that little is asked of.
    left_alone: Option<usize>,
}

impl World {
    /// A fresh store.
    pub(super) fn fresh(plan: &Plan, seed: u64, lab: &mut Lab) -> World {
        let layout = plan.layout();
        let media = Media::formatted(&layout, plan.atomic);
        let opened = open(&layout, media, &Model::default(), &|_| false, lab, None).unwrap().unwrap();
        World::on(plan, layout, opened, Model::default(), Rng::new(seed), 0, false, lab)
    }

    #[expect(clippy::too_many_arguments, reason = "all of a world")]
    fn on(
        plan: &Plan,
        mut layout: Superblock,
        opened: Opened,
        mut model: Model,
        mut rng: Rng,
        depth: u32,
        tainted: bool,
        lab: &mut Lab,
    ) -> World {
        for (key, held) in &opened.found {
            model.get_mut(key).unwrap().settle(held);
        }
        layout.open_count += 1;
        let shared = Arc::new(Shared::new(layout.slots(), layout.shards));
        let mut held_back = recovery::free_slots(&layout, opened.images.iter()).unwrap();
        // Some are prepared later.
        let now = if rng.one_in(2) { held_back.len() } else { rng.index(held_back.len() + 1) };
        for slot in held_back.drain(..now) {
            shared.add_free(FreeSlot::new(slot));
        }
        shared.set_no_more(held_back.is_empty());
        let mut presences = Presences::default();
        let extents = opened.images.iter().flat_map(|image| image.recovered.extents.iter());
        presences.settle(extents.map(|(_, extent)| extent));
        let (mut kept, mut highest) = (FoldMap::default(), FoldMap::default());
        for object in 0..plan.objects {
            let extents = &opened.images[object as usize % opened.images.len()].recovered.extents;
            kept.insert(object, Kept::new(extents.state(object).cloned()));
            highest.insert(object, extents.highest_version(object));
        }
        let layout = Arc::new(layout);
        let mut disk = SimDisk::new(opened.media, lab.pools.take(plan.chunks));
        disk.faults = plan.faults;
        let shards = make_shards(&layout, &shared, opened.images, plan.atomic, plan.flushes);
        let mut shards: Vec<Shard> = shards.collect();
        if plan.scrub {
            let run = 1 + rng.below(3);
            for shard in &mut shards {
                let before = shard.scrub_progress();
                let resumed = before.run == run && (1..u32::MAX).contains(&before.cursor);
                lab.coverage.resumed_scrubs += u64::from(resumed);
                shard.set_scrub(Some(ScrubTask { run, rate_bytes_per_s: 1 << 30 }));
            }
        }
        let next_value = (u64::from(depth) + 1) << 40;
        let mut world = World {
            plan: plan.clone(),
            layout,
            shared,
            shards,
            disk,
            model,
            presences,
            kept,
            highest,
            ops: Vec::new(),
            outcomes: Vec::new(),
            now_ns: 1_000_000 * rng.below(1000),
            rng,
            next_token: 0,
            next_value,
            version: u64::from(depth) << 32,
            held_back,
            failed: false,
            depth,
            tainted,
            owners: FoldMap::default(),
            left_alone: None,
        };
        // Before the first request: see `RESERVE_CHUNKS`.
        for shard in &mut world.shards {
            shard.turn(world.now_ns, &mut world.disk, &mut world.outcomes);
        }
        world
    }

    /// Whether errors may be told that the store has no other reason for.
    fn excused(&self) -> bool {
        self.tainted || self.disk.injected > 0
    }

    /// Does so many steps, with a crash after each that changed what a crash would leave.
    pub(super) fn run(&mut self, lab: &mut Lab) {
        let mut events = u64::MAX;
        for _ in 0..self.plan.steps {
            self.step(lab);
            if std::mem::replace(&mut events, self.disk.events) != self.disk.events {
                self.crash_here(lab);
            }
        }
    }

    /// The same without a crash.
    pub(super) fn run_quietly(&mut self, lab: &mut Lab) {
        for _ in 0..self.plan.steps {
            self.step(lab);
        }
    }

    fn step(&mut self, lab: &mut Lab) {
        match self.rng.below(16) {
            0..5 if self.ops.len() < self.plan.concurrent => self.begin_op(lab),
            0..8 if self.rng.one_in(12) => {
                let object = self.rng.below(self.plan.objects.into()) as u32;
                self.take_inventory(object, lab);
            }
            0..8 => self.turn(lab),
            8 if !self.held_back.is_empty() && self.rng.one_in(4) => {
                let waits = |op: &&Op| matches!(op.doing, Doing::Write { .. });
                if self.shared.free.is_empty() {
                    lab.coverage.starved += self.ops.iter().filter(waits).count() as u64;
                    let reserves = |op: &&Op| matches!(op.doing, Doing::Reserve { is_there: false });
                    lab.coverage.starved_reserves += self.ops.iter().filter(reserves).count() as u64;
                }
                self.prepare_slots();
            }
            _ => self.end_request(lab),
        }
        self.collect(lab);
    }

    /// Asks for all extents of a layer, in pieces.
    fn take_inventory(&mut self, object: u32, lab: &mut Lab) {
        let shard = &self.shards[self.shard_of(object)];
        let (mut held, mut from, max) = (Vec::new(), 0, 1 + self.rng.index(4));
        loop {
            let before = held.len();
            let is_whole = shard.list(object, from, max, &mut held);
            assert!(held.len() - before <= max && (is_whole || held.len() - before == max));
            assert!(held[before..].iter().all(|extent| extent.number >= from), "{held:?}");
            lab.coverage.list_pieces += 1;
            if is_whole {
                break;
            }
            from = held[held.len() - 1].number + 1;
        }
        assert!(held.is_sorted_by(|one, next| one.number < next.number), "{held:?}");
        self.presences.check(object, &held).unwrap();
        let mut active = Vec::new();
        let highest = shard.survey(object, &mut active);
        active.sort_unstable_by_key(|extent| extent.number);
        assert!(active.iter().eq(held.iter().filter(|extent| extent.active)), "{active:?} of {held:?}");
        assert!(held.iter().all(|extent| extent.version <= highest), "{highest} of {held:?}");
        let ends = |op: &Op| op.object == object && op.first == 0 && matches!(op.doing, Doing::Unmap);
        if !self.ops.iter().any(ends) {
            let before = self.highest.insert(object, highest).unwrap();
            assert!(highest >= before, "object {object}: {highest} after {before}");
        }
        let (kept, state) = (&self.kept[&object], shard.state(object));
        assert!(
            kept.known() == state || kept.is_changing() && kept.allows(state),
            "object {object}: {state:?}, known is {kept:?}"
        );
        let hollow = held.iter().filter(|extent| self.presences.is_hollow(object, extent.number));
        lab.coverage.hollow += hollow.count() as u64;
        lab.coverage.lists += 1;
        lab.coverage.listed += held.len() as u64;
        lab.coverage.surveyed_active += active.len() as u64;
    }

    /// What was found when the store was opened again must be all that is there.
    fn check_presences(&self, images: &[Image], lab: &mut Lab) {
        for object in 0..self.plan.objects {
            let extents = images.iter().flat_map(|image| image.recovered.extents.iter());
            let held: Vec<_> = extents
                .filter(|(_, extent)| extent.object == object)
                .map(|(_, extent)| extent.held())
                .collect();
            self.presences.check(object, &held).unwrap_or_else(|error| panic!("after a crash: {error}"));
            lab.coverage.inventories_after_crash += 1;
            let extents = &images[self.shard_of(object)].recovered.extents;
            for number in held.iter().map(|extent| extent.number) {
                if self.presences.is_hollow(object, number) {
                    let (_, extent) = extents.first_from(object, number).unwrap();
                    assert!(
                        extent.hollow || self.ops.iter().any(|op| op.object == object),
                        "after a crash: object {object}: extent {number} does not go by itself any more"
                    );
                    lab.coverage.hollow_after_crash += 1;
                }
            }
            let (kept, state) = (&self.kept[&object], extents.state(object));
            assert!(kept.allows(state), "after a crash: object {object}: {state:?}, known is {kept:?}");
            lab.coverage.states_after_crash += u64::from(state.is_some());
            lab.coverage.newer_states += u64::from(kept.known() != state);
            if kept.is_certain() {
                let (highest, before) = (extents.highest_version(object), self.highest[&object]);
                assert!(highest >= before, "after a crash: object {object}: {highest} after {before}");
                lab.coverage.versions_after_crash += 1;
                let is_gone = held.iter().all(|extent| extent.version < highest);
                lab.coverage.versions_of_gone += u64::from(highest > 0 && is_gone);
            }
        }
    }

    fn prepare_slots(&mut self) {
        for slot in self.held_back.drain(..) {
            self.shared.add_free(FreeSlot::new(slot));
        }
        self.shared.set_no_more(true);
    }

    fn turn(&mut self, lab: &mut Lab) {
        self.now_ns += match self.rng.below(8) {
            0 => 250_000_000,
            1 => 1_100_000_000,
            2 => {
                self.tell_stable(lab);
                1000
            }
            _ => self.rng.below(2_000_000),
        };
        let at = self.rng.index(self.shards.len());
        self.shards[at].turn(self.now_ns, &mut self.disk, &mut self.outcomes);
    }

    fn end_request(&mut self, lab: &mut Lab) {
        let Some((token, blocks, result)) = self.disk.end_any(&mut self.rng) else { return self.turn(lab) };
        let shard = (token >> SHARD_SHIFT & SHARD_MASK) as usize;
        let token = token & !(SHARD_MASK << SHARD_SHIFT);
        self.shards[shard].finished(token, blocks, result, &mut self.disk, &mut self.outcomes);
        // The reactor gives a turn after a batch of them.
        if self.rng.one_in(2) {
            self.now_ns += 10_000;
            self.shards[shard].turn(self.now_ns, &mut self.disk, &mut self.outcomes);
        }
    }

    /// The version that the store is told: without copies it numbers writes itself.
    fn told(&self, version: u64) -> u64 {
        if self.plan.replicated > 0 { version } else { 0 }
    }

    /// Writes with a version up to this are on all copies.
    fn stable_version(&self) -> u64 {
        let versions = self.ops.iter().filter_map(|op| match op.doing {
            Doing::Write { version, .. } | Doing::Lose { version, .. } | Doing::Trim { version, .. } => {
                Some(version)
            }
            _ => None,
        });
        versions.min().unwrap_or(self.version + 1) - 1
    }

    /// The heads tell how far all copies are.
    fn tell_stable(&mut self, lab: &mut Lab) {
        let version = self.stable_version();
        for object in 0..self.plan.objects {
            let shard = self.shard_of(object);
            self.may_release(object, version, lab);
            self.shards[shard].set_stable(object, version);
        }
    }

    /// Extents of a layer may go that wait for a mark which is told now.
    fn may_release(&mut self, object: u32, stable_version: u64, lab: &mut Lab) {
        let gone = self.presences.stable(object, stable_version);
        lab.coverage.released += gone;
        if gone > 0 {
            // What was relied on when it began may be none of theirs any more.
            self.ops.iter_mut().filter(|op| op.object == object).for_each(|op| op.needs_slots = true);
        }
    }

    /// Whether a change has other copies; it tells the store how far all of them are.
    fn copies(&mut self, object: u32, lab: &mut Lab) -> (bool, Copies) {
        if self.rng.below(8) >= self.plan.replicated {
            return (false, Copies::Sole);
        }
        // A head does not always know how far the others are.
        let behind = if self.rng.one_in(3) { 0 } else { self.rng.below(16) };
        let stable_version = self.stable_version().saturating_sub(behind);
        self.may_release(object, stable_version, lab);
        (true, Copies::Others { stable_version })
    }

    fn shard_of(&self, object: u32) -> usize {
        object as usize % self.shards.len()
    }

    fn begin_op(&mut self, lab: &mut Lab) {
        let object = self.rng.below(self.plan.objects.into()) as u32;
        let extent = self.rng.below(self.plan.extents.into());
        if self.left_alone == Some(self.shard_of(object)) && !self.rng.one_in(16) {
            return;
        }
        let within = match self.rng.below(4) {
            0 if self.plan.within > FEW => u64::from(EXTENT_BLOCKS) - 1 - self.rng.below(3),
            _ => self.rng.below(self.plan.within),
        };
        let mut object = object;
        let mut first = extent * u64::from(EXTENT_BLOCKS) + within;
        if self.plan.unmaps > 0 && self.rng.one_in(self.plan.unmaps) {
            let whole = self.rng.one_in(2);
            let from = if whole { first - within } else { first };
            // Where copies are many, extents that go with one of them are what is sought.
            let kinds = if self.plan.replicated > 5 { 4 } else { 2 };
            return match self.rng.below(kinds) {
                0 => self.begin_unmap(object, from, lab),
                _ => self.begin_trim(object, from, lab),
            };
        }
        if self.rng.one_in(self.plan.persists) {
            return self.begin_persist(object);
        }
        if self.rng.one_in(12) {
            // Behind the last extent of the others too: there it is the first to come.
            let extent = extent + self.rng.below(2);
            if let Some((object, extent)) = self.presences.first_hollow().filter(|_| self.rng.one_in(2)) {
                return self.begin_reserve(object, extent, lab);
            }
            return self.begin_reserve(object, extent as u32, lab);
        }
        // Few crashes leave a block suspect: so those are sought.
        let suspect = self.model.iter().find(|(_, known)| known.bad && !known.lost).map(|(key, _)| *key);
        let bad = suspect.or_else(|| self.model.iter().find(|(_, known)| known.bad).map(|(key, _)| *key));
        let mut is_suspect = false;
        if let Some((of, block)) = bad
            && (self.rng.one_in(3) || suspect.is_some() && self.rng.one_in(3))
        {
            (object, first) = (of, block);
            is_suspect = suspect.is_some();
        }
        let count = match self.rng.below(self.plan.longs) {
            0 => 1 + self.rng.below(self.plan.longest),
            _ => 1 + self.rng.below(3.min(self.plan.longest)),
        };
        if self.conflicts(object, first, count) {
            return;
        }
        if self.rng.one_in(12 * self.plan.writes) {
            return self.begin_lose(object, first, lab);
        }
        if self.rng.one_in(if is_suspect { 3 } else { 8 * self.plan.writes }) {
            return self.begin_digest(object, first, lab);
        }
        let mut blocks = Blocks::with_capacity(count as usize);
        for _ in 0..count {
            match self.disk.pool.take_chunk() {
                Some(chunk) => blocks.push(chunk),
                None => return release_blocks(&mut self.disk.pool, blocks),
            }
        }
        let shard = self.shard_of(object);
        if self.rng.one_in(if is_suspect { 3 } else { 16 * self.plan.writes }) {
            let request = self.begun(object, first, count, Doing::Salvage);
            self.shards[shard].salvage(request, object, first, blocks, &mut self.disk, &mut self.outcomes);
            return;
        }
        if self.rng.one_in(3 * self.plan.writes) {
            let request = self.begun(object, first, count, Doing::Read);
            self.shards[shard].read(request, object, first, blocks, &mut self.disk, &mut self.outcomes);
            return;
        }
        let (mut head, mut tail) = (0, 0);
        if self.rng.one_in(2) {
            head = self.rng.below(8);
            tail = self.rng.below(if count == 1 { 8 - head } else { 8 });
            lab.coverage.merges += 1;
        }
        let mut masks = vec![u8::MAX; count as usize];
        masks[0] &= u8::MAX << head;
        masks[count as usize - 1] &= u8::MAX >> tail;
        self.next_value += 1;
        let write = self.next_value;
        let special = self.rng.below(self.plan.varied);
        let mut values = Vec::new();
        for (index, mask) in masks.iter().enumerate() {
            let block = first + index as u64;
            let one = std::array::from_fn(|sector| match special {
                0 => 5,
                1 => 0,
                _ => write << 12 | (block & 0xff) << 3 | sector as u64,
            });
            self.model.entry((object, block)).or_default().begin(*mask, one);
            fill(self.disk.pool.bytes_mut(blocks.get_mut(index)), &one);
            // What is not part of the write must not matter.
            for sector in (0..SECTORS).filter(|sector| mask >> sector & 1 == 0) {
                self.disk.pool.bytes_mut(blocks.get_mut(index))[sector * SECTOR..][..SECTOR].fill(0xbd);
            }
            values.push(one);
        }
        let (replicated, copies) = self.copies(object, lab);
        self.version += 1;
        let version = self.version;
        let in_place = replicated && self.plan.atomic;
        lab.coverage.in_place += u64::from(in_place);
        lab.coverage.long += u64::from(count > 3);
        self.presences.begin(object, &(first..first + count), self.told(version));
        let doing = Doing::Write { masks, values, in_place, version, replicated };
        let request = self.begun(object, first, count, doing);
        let terms = WriteTerms {
            keep_head_bytes: (head as usize * SECTOR) as u16,
            keep_tail_bytes: (tail as usize * SECTOR) as u16,
            copies,
            crcs: Crcs::default(),
            version: self.told(version),
        };
        let (disk, outcomes) = (&mut self.disk, &mut self.outcomes);
        self.shards[shard].write(request, object, first, blocks, terms, disk, outcomes);
    }

    /// Notes a request that begins.
    fn begun(&mut self, object: u32, first: u64, count: u64, doing: Doing) -> RequestToken {
        let token = self.next_token;
        self.next_token += 1;
        let needs_slots = !self.presences.has_all(object, &(first..first + count));
        self.ops.push(Op { token, object, first, count, doing, needs_slots, met_full: false });
        RequestToken(token)
    }

    /// Has an extent made room for; writes of it may be under way, and ends of it may not.
    fn begin_reserve(&mut self, object: u32, extent: u32, lab: &mut Lab) {
        let (first, count) = (u64::from(extent) * u64::from(EXTENT_BLOCKS), u64::from(EXTENT_BLOCKS));
        let takes = |op: &Op| matches!(op.doing, Doing::Unmap | Doing::Trim { .. });
        let overlaps =
            |op: &Op| op.object == object && op.first < first + count && first < op.first + op.count;
        if self.ops.iter().any(|op| takes(op) && overlaps(op)) {
            return;
        }
        lab.coverage.reserves += 1;
        let is_there = self.presences.has(object, extent);
        lab.coverage.reserved_again += u64::from(is_there);
        lab.coverage.kept_hollow += u64::from(self.presences.is_hollow(object, extent));
        self.presences.begin(object, &(first..first + count), 1);
        let request = self.begun(object, first, count, Doing::Reserve { is_there });
        let shard = self.shard_of(object);
        self.shards[shard].reserve(request, object, extent);
    }

    /// Asks what blocks are.
    fn begin_digest(&mut self, object: u32, first: u64, lab: &mut Lab) {
        let within = u64::from(EXTENT_BLOCKS) - first % u64::from(EXTENT_BLOCKS);
        let count = match self.rng.below(4) {
            0 => 1 + self.rng.below(u64::from(EXTENT_BLOCKS)),
            1 => within,
            _ => 1 + self.rng.below(8),
        };
        if self.conflicts(object, first, count) {
            return;
        }
        lab.coverage.digests += 1;
        let shard = self.shard_of(object);
        let pending = (first..first + count).filter(|block| self.shards[shard].is_pending(object, *block));
        lab.coverage.digests_of_pending += pending.count() as u64;
        let request = self.begun(object, first, count, Doing::Digest);
        self.shards[shard].digest(request, object, first..first + count, &mut self.disk, &mut self.outcomes);
    }

    fn digested(&mut self, op: &Op, lab: &mut Lab) {
        let shard = self.shard_of(op.object);
        let digests = self.shards[shard].take_digests(RequestToken(op.token)).expect("it ended well");
        assert_eq!(digests.len() as u64, op.count);
        let excused = self.excused();
        for (block, digest) in (op.first..).zip(digests) {
            let Some(known) = self.model.get_mut(&(op.object, block)) else {
                // A sum page that is gone takes with it that its other blocks have nothing.
                let is_excused = excused && digest == BlockDigest::Lost;
                assert!(
                    digest == BlockDigest::Absent || is_excused,
                    "{op:?} {block}: {digest:?} from nowhere"
                );
                continue;
            };
            let held = match digest {
                BlockDigest::Absent => {
                    lab.coverage.digested_absent += 1;
                    Held::Values([0; SECTORS])
                }
                BlockDigest::Zero => panic!("{op:?} {block}: nothing is made zero"),
                BlockDigest::Data(hash) => {
                    lab.coverage.digested_data += 1;
                    let found = known.by_hash(hash).unwrap_or_else(|error| panic!("{op:?} {block}: {error}"));
                    let Some(values) = found else { continue };
                    Held::Values(values)
                }
                BlockDigest::Suspect { recorded_sum, found_sum, .. } => {
                    lab.coverage.digested_suspect += 1;
                    assert_ne!(recorded_sum, found_sum);
                    Held::Bad
                }
                BlockDigest::Bad => {
                    lab.coverage.digested_bad += 1;
                    assert!(excused, "{op:?} {block} is bad and not suspect: {known:x?}");
                    Held::Bad
                }
                BlockDigest::Lost => {
                    lab.coverage.digested_lost += 1;
                    Held::Lost
                }
            };
            known.check(&held, excused).unwrap_or_else(|error| panic!("{op:?} {block}: {error}"));
            // What an injected fault has done now may be undone by the next look.
            if !self.failed && matches!(held, Held::Values(_)) {
                known.settle(&held);
            }
        }
    }

    /// Says that no good copy is left of blocks.
    fn begin_lose(&mut self, object: u32, first: u64, lab: &mut Lab) {
        let count = match self.rng.below(8) {
            0 => 1 + self.rng.below(u64::from(EXTENT_BLOCKS)),
            _ => 1 + self.rng.below(4),
        };
        if self.conflicts(object, first, count) {
            return;
        }
        let shard = self.shard_of(object);
        for block in first..first + count {
            self.model.entry((object, block)).or_default().begin_lose();
            lab.coverage.loses_of_pending += u64::from(self.shards[shard].is_pending(object, block));
        }
        let (replicated, copies) = self.copies(object, lab);
        self.version += 1;
        let version = self.version;
        let blocks = first..first + count;
        self.presences.begin(object, &blocks, self.told(version));
        lab.coverage.loses += 1;
        let request = self.begun(object, first, count, Doing::Lose { version, replicated });
        let version = self.told(version);
        self.shards[shard].lose(request, object, blocks, copies, version);
    }

    /// Has something kept of a layer's replica: small mostly, as large as there may be at times.
    fn begin_persist(&mut self, object: u32) {
        let ends = |op: &Op| op.object == object && op.first == 0 && matches!(op.doing, Doing::Unmap);
        if self.ops.iter().any(ends) {
            return;
        }
        let count = match self.rng.below(8) {
            0 => EPOCHS_MAX,
            1 => self.rng.index(EPOCHS_MAX),
            _ => self.rng.index(6),
        };
        let first = self.rng.up_to_bits(31) as u32;
        let epochs = (first..).take(count).map(|partition| (partition, self.rng.next()));
        let epochs = Epochs::new(epochs.collect()).unwrap();
        self.next_value += 1;
        let state = Arc::new(ReplicaState {
            // No two are the same.
            takeover: self.next_value,
            start: self.rng.next(),
            head: cluster_map::NodeId([self.rng.next() as u8; 16]),
            revision: self.rng.next(),
            epochs,
        });
        self.kept.get_mut(&object).unwrap().begin(Some(Arc::clone(&state)));
        let request = self.begun(object, 0, 0, Doing::Persist { state: Arc::clone(&state) });
        let shard = self.shard_of(object);
        self.shards[shard].persist(request, object, state);
    }

    /// Whether states may have no more room, with another one of a layer.
    fn may_lack_room(&self, object: u32, state: &ReplicaState) -> bool {
        let shard = self.shard_of(object);
        let others =
            self.kept.iter().filter(|(other, _)| self.shard_of(**other) == shard && **other != object);
        let others: usize = others.map(|(_, kept)| kept.units()).sum();
        others + state.units() > self.layout.state_units_max()
    }

    fn reserves(&self, object: u32, first: u64, count: u64) -> bool {
        let reserves = |op: &&Op| matches!(op.doing, Doing::Reserve { .. });
        let overlaps =
            |op: &Op| op.object == object && op.first < first + count && first < op.first + op.count;
        self.ops.iter().filter(reserves).any(overlaps)
    }

    fn begin_unmap(&mut self, object: u32, first: u64, lab: &mut Lab) {
        if self.conflicts(object, first, u64::MAX - first) || self.reserves(object, first, u64::MAX - first) {
            return;
        }
        let persists = |op: &Op| op.object == object && matches!(op.doing, Doing::Persist { .. });
        if first == 0 && self.ops.iter().any(persists) {
            return;
        }
        for ((_, _), known) in self.model.iter_mut().filter(|((o, b), _)| *o == object && *b >= first) {
            known.begin(u8::MAX, [0; SECTORS]);
        }
        if first == 0 {
            self.kept.get_mut(&object).unwrap().begin(None);
        }
        lab.coverage.unmaps += 1;
        self.presences.begin_removal(object, &(first..u64::MAX), None);
        let (token, count) = (u32::MAX, u64::MAX - first);
        let (needs_slots, met_full) = (false, false);
        self.ops.push(Op { token, object, first, count, doing: Doing::Unmap, needs_slots, met_full });
        let shard = self.shard_of(object);
        self.shards[shard].unmap(object, first);
    }

    /// Takes a range from a layer, as a request.
    fn begin_trim(&mut self, object: u32, first: u64, lab: &mut Lab) {
        let count = match self.rng.below(3) {
            0 => 1 + self.rng.below(8),
            1 => u64::from(EXTENT_BLOCKS) * (1 + self.rng.below(2)),
            _ => 1 + self.rng.below(2 * u64::from(EXTENT_BLOCKS)),
        };
        if self.conflicts(object, first, count) || self.reserves(object, first, count) {
            return;
        }
        let gone = first..first + count;
        for (_, known) in self.model.iter_mut().filter(|((o, b), _)| *o == object && gone.contains(b)) {
            known.begin(u8::MAX, [0; SECTORS]);
        }
        lab.coverage.trims += 1;
        let (replicated, copies) = self.copies(object, lab);
        self.version += 1;
        let version = self.version;
        if replicated {
            self.presences.begin_trim(object, &gone, version);
        } else {
            self.presences.begin_removal(object, &gone, Some(self.told(version)));
        }
        let request = self.begun(object, first, count, Doing::Trim { version, replicated });
        let (shard, version) = (self.shard_of(object), self.told(version));
        self.shards[shard].unmap_range(request, object, gone, copies, version);
    }

    fn conflicts(&self, object: u32, first: u64, count: u64) -> bool {
        let needs_order = |op: &&Op| !matches!(op.doing, Doing::Reserve { .. } | Doing::Persist { .. });
        self.ops
            .iter()
            .filter(needs_order)
            .any(|op| op.object == object && op.first < first + count && first < op.first + op.count)
    }

    /// Takes what the shards tell.
    fn collect(&mut self, lab: &mut Lab) {
        // Extents that went since the last time are still counted here.
        let blocked: usize = self.shards.iter().map(Shard::blocked_twins).sum();
        if self.held_back.is_empty() && self.presences.most() + blocked >= self.layout.slots() as usize {
            self.ops.iter_mut().for_each(|op| op.met_full = true);
        }
        for outcome in std::mem::take(&mut self.outcomes) {
            let at = self.ops.iter().position(|op| op.token == outcome.request.0).expect("one outcome each");
            let op = self.ops.swap_remove(at);
            self.ended(op, &outcome, lab);
            release_blocks(&mut self.disk.pool, outcome.blocks);
        }
        while let Some(event) = self.shared.events.pop() {
            match event {
                ShardEvent::Unmapped { object, from_block: first } => {
                    let is_it = |op: &Op| {
                        matches!(op.doing, Doing::Unmap) && op.object == object && op.first == first
                    };
                    let at = self.ops.iter().position(is_it).expect("an unmap that was asked for");
                    self.ops.swap_remove(at);
                    self.presences.removed(object, &(first..u64::MAX));
                    if first == 0 {
                        let kept = self.kept.get_mut(&object).unwrap();
                        lab.coverage.forgotten += u64::from(kept.known().is_some());
                        kept.done(None);
                        self.highest.insert(object, 0);
                    }
                    for (_, known) in self.model.iter_mut().filter(|((o, b), _)| *o == object && *b >= first)
                    {
                        known.acknowledge(u8::MAX, &[0; SECTORS]);
                    }
                }
                ShardEvent::Failed { why, .. } => {
                    assert!(self.excused(), "a shard failed: {why}");
                    self.failed = true;
                }
            }
        }
    }

    fn ended(&mut self, op: Op, outcome: &Outcome, lab: &mut Lab) {
        let region = Arc::clone(self.disk.pool.region());
        let what = format!("{op:?}");
        let salvages = matches!(op.doing, Doing::Salvage);
        let takes_slots =
            matches!(op.doing, Doing::Write { .. } | Doing::Reserve { .. } | Doing::Lose { .. });
        let may_lack_slots = takes_slots && op.needs_slots && op.met_full;
        let may_lack_slots = may_lack_slots || matches!(op.doing, Doing::Persist { .. });
        assert!(
            may_lack_slots || outcome.result != Err(StoreError::NoSpace),
            "{what}: there is a slot for it"
        );
        match (&op.doing, outcome.result) {
            (Doing::Digest, Ok(())) => return self.digested(&op, lab),
            (Doing::Digest, Err(error)) => panic!("{what}: {error:?}"),
            _ => {}
        }
        match (op.doing, outcome.result) {
            (Doing::Digest, _) => unreachable!("returned above"),
            (Doing::Read | Doing::Salvage, Ok(())) => {
                assert_eq!(outcome.blocks.len() as u64, op.count, "a read gives its chunks back");
                let counter = if salvages { &mut lab.coverage.salvages } else { &mut lab.coverage.reads };
                *counter += 1;
                let excused = self.excused();
                for (block, chunk) in (op.first..).zip(outcome.blocks.iter()) {
                    if salvages
                        && let Some(known) = self.model.get(&(op.object, block))
                        && (known.bad && !known.lost || excused)
                    {
                        lab.coverage.salvaged_suspects += u64::from(known.bad);
                        continue;
                    }
                    let held = Held::Values(
                        values_of(region.bytes(chunk)).unwrap_or_else(|error| panic!("{what}: {error}")),
                    );
                    let Some(known) = self.model.get_mut(&(op.object, block)) else {
                        assert_eq!(held, Held::Values([0; SECTORS]), "{what}: data from nowhere");
                        continue;
                    };
                    known.check(&held, false).unwrap_or_else(|error| panic!("{what} read {block}: {error}"));
                    // A shard that failed does not know what its last writes have become.
                    if !self.failed && !self.shared.has_failed() {
                        known.settle(&held);
                    }
                }
            }
            (Doing::Read | Doing::Salvage, Err(error)) => {
                assert!(!salvages || error != StoreError::Corrupt { suspect: true }, "{what} is refused");
                assert_eq!(outcome.blocks.len() as u64, op.count, "a read gives its chunks back");
                self.check_error(&what, op.object, op.first..op.first + op.count, error, lab);
            }
            (Doing::Write { masks, values, version, replicated, .. }, Ok(())) => {
                lab.coverage.acknowledged += 1;
                let version = self.told(version);
                self.presences.done(op.object, &(op.first..op.first + op.count), version, replicated);
                self.saw(op.object, version);
                for ((block, mask), values) in (op.first..).zip(masks).zip(&values) {
                    let known = self.model.get_mut(&(op.object, block)).unwrap();
                    assert!(
                        known.may_be_good() || mask == u8::MAX,
                        "{what}: a bad block was merged into: {known:x?}"
                    );
                    lab.coverage.lost_made_whole += u64::from(known.lost);
                    lab.coverage.suspects_made_whole += u64::from(known.bad && !known.lost);
                    known.acknowledge(mask, values);
                }
            }
            (Doing::Write { masks, values, .. }, Err(error)) => {
                let blocks = op.first..op.first + op.count;
                self.check_error(&what, op.object, blocks.clone(), error, lab);
                let undone_from = undone_from(&blocks, error);
                self.presences.failed(op.object, &blocks, undone_from);
                for ((block, mask), values) in blocks.zip(masks).zip(&values) {
                    if block >= undone_from {
                        self.model.get_mut(&(op.object, block)).unwrap().refuse(mask, values);
                    }
                }
            }
            (Doing::Reserve { is_there }, Ok(())) => {
                lab.coverage.reserved += u64::from(!is_there);
                self.presences.done(op.object, &(op.first..op.first + op.count), 0, false);
            }
            (Doing::Reserve { .. }, Err(error)) => {
                lab.coverage.refused_reserves += u64::from(error == StoreError::NoSpace);
                self.check_error(&what, op.object, op.first..op.first, error, lab);
                let blocks = op.first..op.first + op.count;
                self.presences.failed(op.object, &blocks, undone_from(&blocks, error));
            }
            (Doing::Lose { version, replicated }, Ok(())) => {
                let (blocks, version) = (op.first..op.first + op.count, self.told(version));
                self.presences.done(op.object, &blocks, version, replicated);
                self.saw(op.object, version);
                lab.coverage.lost += op.count;
                let shard = &self.shards[self.shard_of(op.object)];
                for block in blocks {
                    assert!(
                        !shard.is_pending(op.object, block),
                        "{what}: older data of {block} are on their way"
                    );
                    self.model.get_mut(&(op.object, block)).unwrap().lose();
                }
            }
            (Doing::Lose { .. }, Err(error)) => {
                let blocks = op.first..op.first + op.count;
                self.check_error(&what, op.object, blocks.clone(), error, lab);
                let undone_from = undone_from(&blocks, error);
                self.presences.failed(op.object, &blocks, undone_from);
                for block in blocks {
                    self.model.get_mut(&(op.object, block)).unwrap().end_lose(block < undone_from);
                }
            }
            (Doing::Persist { state }, Ok(())) => {
                lab.coverage.persisted += 1;
                let kept = self.kept.get_mut(&op.object).unwrap();
                kept.done(Some(&state));
                let found = self.shards[self.shard_of(op.object)].state(op.object);
                assert!(self.kept[&op.object].allows(found), "{what}: {found:?}");
            }
            (Doing::Persist { state }, Err(StoreError::NoSpace)) => {
                lab.coverage.refused_persists += 1;
                assert!(self.may_lack_room(op.object, &state), "{what} is refused and has room");
                self.kept.get_mut(&op.object).unwrap().refused(&state);
            }
            (Doing::Persist { .. }, Err(error)) => {
                self.check_error(&what, op.object, 0..0, error, lab);
            }
            (Doing::Trim { version, replicated }, Ok(())) => {
                let gone = op.first..op.first + op.count;
                if replicated {
                    self.presences.trimmed(op.object, &gone, version);
                } else {
                    self.presences.removed(op.object, &gone);
                }
                let model = self.model.iter_mut();
                for (_, known) in model.filter(|((o, b), _)| *o == op.object && gone.contains(b)) {
                    known.acknowledge(u8::MAX, &[0; SECTORS]);
                }
            }
            (Doing::Trim { .. }, Err(error)) => {
                self.check_error(&what, op.object, op.first..op.first + op.count, error, lab);
            }
            (Doing::Unmap, _) => unreachable!("unmaps end with an event"),
        }
    }

    /// A version of a layer is durable.
    fn saw(&mut self, object: u32, version: u64) {
        let highest = self.highest.get_mut(&object).unwrap();
        *highest = version.max(*highest);
    }

    fn check_error(&self, what: &str, object: u32, blocks: Range<u64>, error: StoreError, lab: &mut Lab) {
        lab.coverage.named_errors += 1;
        let bad =
            || blocks.clone().any(|block| self.model.get(&(object, block)).is_some_and(|known| known.bad));
        let is_write =
            ["Write", "Trim", "Reserve", "Lose", "Persist"].iter().any(|doing| what.contains(doing));
        let fine = match error {
            StoreError::Corrupt { suspect } => {
                lab.coverage.refused_merges += u64::from(is_write);
                (bad() && suspect) || self.excused()
            }
            StoreError::NoSpace => {
                lab.coverage.no_space += 1;
                true
            }
            StoreError::NoMemory => {
                lab.coverage.no_memory += 1;
                true
            }
            StoreError::Unwritable(_) => is_write && self.excused(),
            StoreError::Unreadable(_) => self.excused(),
            StoreError::Lost => {
                let which = if is_write {
                    &mut lab.coverage.refused_lost_merges
                } else {
                    &mut lab.coverage.refused_lost_reads
                };
                *which += 1;
                let mut known = blocks.clone().filter_map(|block| self.model.get(&(object, block)));
                known.any(|known| known.lost || known.maybe_lost) || self.excused()
            }
            StoreError::OutOfRange | StoreError::NoHead => false,
        };
        assert!(fine, "{what}: {error:?} without a reason");
    }

    /// Whether a crash now may leave a block that matches no record.
    fn in_place_now(&self) -> impl Fn(&Key) -> bool + use<> {
        let in_flight: Vec<(u32, u64, u64)> = self
            .ops
            .iter()
            .filter(|op| matches!(op.doing, Doing::Write { in_place: true, .. }))
            .map(|op| (op.object, op.first, op.first + op.count))
            .collect();
        let all = self.excused();
        move |key| {
            all || in_flight
                .iter()
                .any(|(object, from, to)| *object == key.0 && (*from..*to).contains(&key.1))
        }
    }

    /// Whether a store that cannot be opened is explained by what was done to it.
    fn may_refuse(&self) -> bool {
        self.excused() && self.plan.faults.lost + self.plan.faults.rot > 0
    }

    fn crash_here(&mut self, lab: &mut Lab) {
        let power = !self.rng.one_in(4);
        let mut rng = Rng::new(self.rng.next());
        let media = self.disk.crash(power, &mut rng);
        lab.coverage.crash_points += 1;
        lab.coverage.power_cuts += u64::from(power);
        match self.depth {
            0 => {}
            1 => lab.coverage.second_crashes += 1,
            _ => lab.coverage.third_crashes += 1,
        }
        let ghost = rng.one_in(8);
        let mut ghost_rng = Rng::new(rng.next());
        let excused = self.in_place_now();
        let result = open(&self.layout, media, &self.model, &excused, lab, ghost.then_some(&mut ghost_rng));
        let opened = match result {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) if self.may_refuse() => {
                lab.coverage.refused_opens += 1;
                let _ = error;
                return;
            }
            Ok(Err(error)) => panic!("crash {} at depth {}: {error}", lab.coverage.crash_points, self.depth),
            Err(error) => {
                panic!("crash at depth {} (power {power}): {error}\nin progress: {:?}", self.depth, self.ops)
            }
        };
        if !self.excused() {
            self.check_presences(&opened.images, lab);
        }
        for (shard, image) in opened.images.iter().enumerate() {
            for (_, extent) in image.recovered.extents.iter() {
                for (_, half) in extent.live() {
                    let before = self.owners.insert(half.slot, shard);
                    lab.coverage.moved_slots += u64::from(before.is_some_and(|before| before != shard));
                }
            }
        }
        let torn = opened.images.iter().position(|image| image.findings.torn_tail);
        let is_telling = torn.is_some() || self.shards.iter().any(Shard::has_unproved);
        let nest = if is_telling { self.plan.nest_telling } else { self.plan.nest };
        if self.depth < 2 && rng.one_in(nest) {
            let mut layout = (*self.layout).clone();
            if rng.one_in(6)
                && let Some(grown) =
                    layout.grown(layout.device_bytes + 2 * (EXTENT_BYTES + 2 * BLOCK) + (2 << 20))
            {
                layout = grown;
                lab.coverage.growths += 1;
            }
            let mut plan = self.plan.clone();
            plan.steps = 12 + rng.below(30) as u32;
            plan.faults = Faults::default();
            let tainted = self.excused();
            let model = self.model.clone();
            let mut child = World::on(&plan, layout, opened, model, rng, self.depth + 1, tainted, lab);
            child.version = self.version;
            child.left_alone = torn.filter(|_| self.plan.leaves_alone && child.rng.one_in(2));
            child.next_value = self.next_value + (1 << 30) * (1 + child.rng.below(1 << 8));
            child.run(lab);
            if child.rng.one_in(2) {
                child.finish(lab);
            } else {
                child.abandon(lab);
            }
        }
    }

    fn count_moves(&mut self, lab: &mut Lab) {
        lab.coverage.checkpoints +=
            self.shared.counters.checkpoints.load(std::sync::atomic::Ordering::Relaxed);
        lab.coverage.faults += self.disk.injected;
        for tally in self.shards.iter().map(Shard::twin_tally) {
            lab.coverage.redirected += tally.redirected;
            lab.coverage.redirected_to_twins += tally.to_twins;
            lab.coverage.moved_blocks += tally.moved;
            lab.coverage.moved_states += tally.moved_states;
            lab.coverage.failed_moves += tally.failed;
            lab.coverage.vacated += tally.vacated;
        }
    }

    /// Leaves everything as it is.
    pub(super) fn abandon(mut self, lab: &mut Lab) {
        self.count_moves(lab);
        for shard in self.shards {
            shard.abandon(&mut self.disk.pool);
        }
        for outcome in self.outcomes {
            release_blocks(&mut self.disk.pool, outcome.blocks);
        }
        let (pool, _) = self.disk.dissolve();
        lab.pools.give(pool);
    }

    fn until(&mut self, lab: &mut Lab, what: &str, done: impl Fn(&World) -> bool) {
        for _ in 0..100_000 {
            if done(self) {
                return;
            }
            if self.disk.in_flight() > 0 {
                self.end_request(lab);
            }
            self.now_ns += 20_000_000;
            self.tell_stable(lab);
            for at in 0..self.shards.len() {
                self.shards[at].turn(self.now_ns, &mut self.disk, &mut self.outcomes);
            }
            self.collect(lab);
        }
        let at_rest: Vec<bool> = self.shards.iter().map(Shard::is_idle).collect();
        panic!("{what} does not come to its end: {:?}; shards at rest: {at_rest:?}", self.ops);
    }

    /// Lets everything end, closes, opens again, and reads all of it.
    pub(super) fn finish(mut self, lab: &mut Lab) {
        if !self.held_back.is_empty() {
            self.prepare_slots();
        }
        // What is injected would go on forever.
        self.disk.faults = Faults::default();
        self.until(lab, "the work", |world| {
            world.disk.in_flight() == 0
                && world.ops.iter().all(|op| world.failed && matches!(op.doing, Doing::Unmap))
        });
        if self.rng.one_in(2) {
            self.read_all(lab);
        }
        if !self.failed && !self.shared.has_failed() {
            // Every mark has passed by now.
            let has_none = |shard: &Shard| shard.hollow_extents() == 0;
            self.until(lab, "the wait for the stable mark", |world| world.shards.iter().all(has_none));
        }
        self.shards.iter_mut().for_each(Shard::close);
        self.until(lab, "closing", |world| world.shards.iter().all(Shard::is_closed));
        lab.coverage.closes += 1;
        self.count_moves(lab);
        let excused_bad = self.excused();
        let layout = (*self.layout).clone();
        for shard in self.shards {
            shard.dissolve(&mut self.disk.pool);
        }
        // A shard may not have told it yet.
        let failed = self.failed || self.shared.has_failed();
        let (pool, mut media) = self.disk.dissolve();
        lab.pools.give(pool);
        if self.rng.one_in(2) {
            media.cut(&mut self.rng);
        }
        let opened = match open(&layout, media, &self.model, &|_| excused_bad, lab, None).unwrap() {
            Ok(opened) => opened,
            Err(_) if excused_bad => {
                lab.coverage.refused_opens += 1;
                return;
            }
            Err(error) => panic!("after it was closed: {error}"),
        };
        let known_bad = self.model.values().any(|known| known.bad);
        for image in &opened.images {
            if !failed {
                assert_eq!(image.findings.replaced_blocks, 0, "all was in place: {:?}", image.findings);
                assert!(
                    !image.findings.torn_tail || self.depth > 0,
                    "a torn batch stays until another is written"
                );
            }
            lab.coverage.settled += u64::from(!failed && !known_bad && image.findings.suspect_regions == 0);
        }
        let mut plan = self.plan.clone();
        plan.faults = Faults::default();
        let mut again = World::on(&plan, layout, opened, self.model, self.rng, self.depth, excused_bad, lab);
        again.read_all(lab);
        for object in 0..again.plan.objects {
            again.take_inventory(object, lab);
        }
        again.abandon(lab);
    }

    fn read_all(&mut self, lab: &mut Lab) {
        let mut keys: Vec<Key> = self.model.keys().copied().collect();
        keys.sort_unstable();
        for (object, block) in keys {
            let mut blocks = Blocks::new();
            if self.conflicts(object, block, 1) {
                continue;
            }
            let Some(chunk) = self.disk.pool.take_chunk() else { continue };
            blocks.push(chunk);
            let request = self.begun(object, block, 1, Doing::Read);
            let shard = self.shard_of(object);
            self.shards[shard].read(request, object, block, blocks, &mut self.disk, &mut self.outcomes);
            self.collect(lab);
            while self.disk.in_flight() > 0 {
                self.end_request(lab);
                self.collect(lab);
            }
        }
    }

    /// Lets everything end, without closing: what a damage test begins with.
    pub(super) fn rest(mut self, lab: &mut Lab) -> (Superblock, Media, Model) {
        if !self.held_back.is_empty() {
            self.prepare_slots();
        }
        self.until(lab, "the work", |world| {
            world.disk.in_flight() == 0
                && world.ops.is_empty()
                && world.shards.iter().all(|shard| shard.is_idle() && shard.wants_turn_at_ns().is_none())
        });
        let (layout, model) = ((*self.layout).clone(), self.model.clone());
        self.count_moves(lab);
        for shard in self.shards {
            shard.dissolve(&mut self.disk.pool);
        }
        let (pool, media) = self.disk.dissolve();
        lab.pools.give(pool);
        (layout, media, model)
    }
}
