//! The order of overlapping requests: a request may start only when every earlier one that conflicts with it has been
//! answered.
//!
//! Keeps the part of I6 that a target can keep by itself: requests of one export that overlap execute, and are
//! acknowledged, in their order of arrival. The Linux initiator resends a write under a new tag while the first copy may
//! still be in flight; without this order the late copy could land on top of a newer write.
//!
//! Invariants
//! * Blocks of 4 KiB are the unit of conflict, because a smaller write is a read-modify-write of its block.
//! * Each block has one queue in order of arrival. A request holds a place in the queue of every block it touches, taken
//!   at once when it is admitted, so that any two requests stand in the same order in every queue they share: no
//!   deadlock is possible.
//! * Granted in a queue are either its first request alone, if that is exclusive, or the shared ones before the first
//!   exclusive one.
//! * A request may start when it is granted in all its queues; it leaves all of them when it has been answered.
//! * A newcomer may *join* a request instead of standing in the queues itself, and is then executed and answered in that
//!   request's place. In each block that both touch no conflicting request has been admitted since, and each block that
//!   only the newcomer touches grants the request at once and becomes one of its blocks. So nothing that conflicts with
//!   the newcomer lies between the two places, and either order gives the same bytes. And since the added place never
//!   waits, requests still wait only for ones that were admitted before them: no deadlock is possible.
//!
//! The cost of a request depends neither on how many exports there are nor on how many requests are in flight: queues
//! are found by hash and places are linked. All memory is taken at construction.

/// Most blocks of one request: 16 sectors that begin inside a block touch three.
pub const BLOCKS_PER_REQUEST_MAX: usize = 3;

const NONE: u32 = u32::MAX;

/// A request's place in the table, chosen by the caller below the number given at construction, free of other use until
/// it is released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u32);

/// What a request does to its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads: shares blocks with other reads.
    Shared,
    /// Writes, or must see no write in progress.
    Exclusive,
}

/// What became of an admitted request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It may start now.
    Granted,
    /// It stands behind another one and will be named by a later [`RangeOrder::release`].
    Queued,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    queue: u32,
    next: u32,
    prev: u32,
    /// Exclusive places that its queue had been given before it.
    exclusives_before: u32,
    access: Access,
    granted: bool,
}

const FREE_PLACE: Place = Place {
    queue: NONE,
    next: NONE,
    prev: NONE,
    exclusives_before: 0,
    access: Access::Shared,
    granted: false,
};

#[derive(Debug, Clone, Copy)]
struct BlockQueue {
    domain: u32,
    block: u64,
    head: u32,
    tail: u32,
    bucket_next: u32,
    /// Exclusive places that it has been given; modulo 2^32, far more than can stand in it at a time.
    exclusives: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Request {
    /// Places in use; 0 for an id that is free.
    blocks: u8,
    /// Places not granted yet.
    waiting: u8,
}

/// The queues of all exports that one core serves.
#[derive(Debug)]
pub struct RangeOrder {
    requests: Box<[Request]>,
    /// Places of request `r` lie at `r * BLOCKS_PER_REQUEST_MAX ..`.
    places: Box<[Place]>,
    queues: Box<[BlockQueue]>,
    queues_free: Vec<u32>,
    buckets: Box<[u32]>,
    bucket_shift: u32,
}

impl RangeOrder {
    /// A table for at most `requests_max` requests at a time.
    ///
    /// # Panics
    /// If `requests_max` is 0 or above 2^24.
    #[must_use]
    pub fn new(requests_max: u32) -> RangeOrder {
        assert!(requests_max > 0 && requests_max <= 1 << 24);
        let places = requests_max as usize * BLOCKS_PER_REQUEST_MAX;
        // Twice as many buckets as queues can exist keeps chains near one.
        let buckets = (places * 2).next_power_of_two();
        let empty =
            BlockQueue { domain: 0, block: 0, head: NONE, tail: NONE, bucket_next: NONE, exclusives: 0 };
        let queue_ids = 0..requests_max * 3;
        RangeOrder {
            requests: vec![Request::default(); requests_max as usize].into(),
            places: vec![FREE_PLACE; places].into(),
            queues: vec![empty; places].into(),
            queues_free: queue_ids.rev().collect(),
            buckets: vec![NONE; buckets].into(),
            bucket_shift: 64 - buckets.trailing_zeros(),
        }
    }

    /// Puts a request that touches blocks `first_block ..= last_block` of `domain` (an export) behind all earlier ones.
    ///
    /// # Panics
    /// If `id` is in use or out of range, or the range is empty or has more than [`BLOCKS_PER_REQUEST_MAX`] blocks: all
    /// three are errors of the caller.
    pub fn admit(
        &mut self,
        id: RequestId,
        domain: u32,
        first_block: u64,
        last_block: u64,
        access: Access,
    ) -> Admission {
        assert_eq!(self.requests[id.0 as usize].blocks, 0, "the id is in use");
        assert!(first_block <= last_block && last_block - first_block < BLOCKS_PER_REQUEST_MAX as u64);
        let mut request = Request::default();
        for (place, block) in (Self::first_place(id)..).zip(first_block..=last_block) {
            let granted = self.enqueue(place, domain, block, access);
            request.blocks += 1;
            request.waiting += u8::from(!granted);
        }
        self.requests[id.0 as usize] = request;
        if request.waiting == 0 { Admission::Granted } else { Admission::Queued }
    }

    /// The requests that stand in the queue of a block with no conflicting one behind them, the newest first: the last
    /// exclusive one, or the shared ones behind it.
    pub fn newest(&self, domain: u32, block: u64) -> impl Iterator<Item = RequestId> {
        let tail = self.find_queue(domain, block).map_or(NONE, |queue| self.queues[queue as usize].tail);
        let mut at = tail;
        std::iter::from_fn(move || {
            let place = self.places.get(at as usize)?;
            if at != tail && place.access == Access::Exclusive {
                return None;
            }
            let id = RequestId(at / 3);
            at = if place.access == Access::Exclusive { NONE } else { place.prev };
            Some(id)
        })
    }

    /// Whether a newcomer of the same access may join request `id` of the same `domain`: see the module's head. The
    /// request may have started only if it has all the newcomer's blocks: that is for the caller to know.
    #[must_use]
    pub fn may_join(&self, id: RequestId, domain: u32, first_block: u64, last_block: u64) -> bool {
        let blocks = self.requests[id.0 as usize].blocks;
        let access = self.places[Self::first_place(id) as usize].access;
        let mut blocks_with_added = usize::from(blocks);
        let in_order = (first_block..=last_block).all(|block| {
            let Some(queue) = self.find_queue(domain, block) else {
                blocks_with_added += 1;
                return true;
            };
            match self.place_in(id, queue) {
                Some(place) => self.is_unfollowed(place),
                None => {
                    blocks_with_added += 1;
                    self.grants_at_once(queue, access)
                }
            }
        });
        blocks > 0 && in_order && blocks_with_added <= BLOCKS_PER_REQUEST_MAX
    }

    /// A newcomer joins request `id`, which gets those of its blocks that it does not have.
    ///
    /// # Panics
    /// If it [may not](RangeOrder::may_join): an error of the caller.
    pub fn join(&mut self, id: RequestId, domain: u32, first_block: u64, last_block: u64) {
        let access = self.places[Self::first_place(id) as usize].access;
        for block in first_block..=last_block {
            if self.find_queue(domain, block).is_some_and(|queue| self.place_in(id, queue).is_some()) {
                continue;
            }
            let blocks = self.requests[id.0 as usize].blocks;
            assert!(usize::from(blocks) < BLOCKS_PER_REQUEST_MAX, "joined a request that has no room");
            let granted = self.enqueue(Self::first_place(id) + u32::from(blocks), domain, block, access);
            assert!(granted, "joined out of order");
            self.requests[id.0 as usize].blocks += 1;
        }
    }

    /// Takes an answered request out; requests that may start now are handed to `granted`, in order of arrival within
    /// each block.
    ///
    /// # Panics
    /// If `id` is not in use or was not granted.
    pub fn release(&mut self, id: RequestId, mut granted: impl FnMut(RequestId)) {
        let request = std::mem::take(&mut self.requests[id.0 as usize]);
        assert!(request.blocks > 0 && request.waiting == 0, "released a request that had not started");
        let first = Self::first_place(id);
        for place in first..first + u32::from(request.blocks) {
            self.leave(place, &mut granted);
        }
    }

    /// Whether nothing is admitted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queues_free.len() == self.queues.len()
    }

    fn first_place(id: RequestId) -> u32 {
        id.0 * 3
    }

    /// The request's place in a queue.
    fn place_in(&self, id: RequestId, queue: u32) -> Option<&Place> {
        let first = Self::first_place(id) as usize;
        let blocks = usize::from(self.requests[id.0 as usize].blocks);
        self.places[first..first + blocks].iter().find(|place| place.queue == queue)
    }

    /// Whether no conflicting request has been admitted behind a place.
    fn is_unfollowed(&self, place: &Place) -> bool {
        match place.access {
            Access::Exclusive => place.next == NONE,
            Access::Shared => place.exclusives_before == self.queues[place.queue as usize].exclusives,
        }
    }

    /// Whether a place appended to this queue, which is not empty, would not have to wait.
    fn grants_at_once(&self, queue: u32, access: Access) -> bool {
        let tail = &self.places[self.queues[queue as usize].tail as usize];
        access == Access::Shared && tail.access == Access::Shared && tail.granted
    }

    fn bucket(&self, domain: u32, block: u64) -> usize {
        // Fibonacci hashing; the second odd constant keeps equal blocks of different exports apart.
        let mixed = block
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(u64::from(domain).wrapping_mul(0xd6e8_feb8_6659_fd93))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(mixed >> self.bucket_shift).expect("fewer buckets than usize")
    }

    /// Appends the place to its block's queue; whether it is granted there.
    fn enqueue(&mut self, place: u32, domain: u32, block: u64, access: Access) -> bool {
        let (queue, granted) = match self.find_queue(domain, block) {
            Some(queue) => (queue, self.grants_at_once(queue, access)),
            None => (self.make_queue(domain, block), true),
        };
        let own = &mut self.queues[queue as usize];
        let prev = std::mem::replace(&mut own.tail, place);
        let exclusives_before = own.exclusives;
        own.exclusives = exclusives_before.wrapping_add(u32::from(access == Access::Exclusive));
        match prev {
            NONE => own.head = place,
            before => self.places[before as usize].next = place,
        }
        self.places[place as usize] = Place { queue, next: NONE, prev, exclusives_before, access, granted };
        granted
    }

    fn find_queue(&self, domain: u32, block: u64) -> Option<u32> {
        let mut at = self.buckets[self.bucket(domain, block)];
        while let Some(queue) = self.queues.get(at as usize) {
            if queue.block == block && queue.domain == domain {
                return Some(at);
            }
            at = queue.bucket_next;
        }
        None
    }

    fn make_queue(&mut self, domain: u32, block: u64) -> u32 {
        let bucket = self.bucket(domain, block);
        let made = self.queues_free.pop().expect("as many queues as places");
        let bucket_next = std::mem::replace(&mut self.buckets[bucket], made);
        self.queues[made as usize] =
            BlockQueue { domain, block, head: NONE, tail: NONE, bucket_next, exclusives: 0 };
        made
    }

    /// Takes a place out of its queue and grants what stood behind it.
    fn leave(&mut self, place: u32, granted: &mut impl FnMut(RequestId)) {
        let Place { queue, next, prev, .. } = std::mem::replace(&mut self.places[place as usize], FREE_PLACE);
        match prev {
            NONE => self.queues[queue as usize].head = next,
            before => self.places[before as usize].next = next,
        }
        match next {
            NONE => self.queues[queue as usize].tail = prev,
            after => self.places[after as usize].prev = prev,
        }
        match self.queues[queue as usize].head {
            NONE => self.remove_queue(queue),
            // A leaver that was not first leaves earlier shared ones behind, which stay as they are.
            head if prev == NONE => self.grant_front(head, granted),
            _ => {}
        }
    }

    fn remove_queue(&mut self, queue: u32) {
        let BlockQueue { domain, block, bucket_next, .. } = self.queues[queue as usize];
        let bucket = self.bucket(domain, block);
        if self.buckets[bucket] == queue {
            self.buckets[bucket] = bucket_next;
        } else {
            let mut at = self.buckets[bucket];
            while self.queues[at as usize].bucket_next != queue {
                at = self.queues[at as usize].bucket_next;
            }
            self.queues[at as usize].bucket_next = bucket_next;
        }
        self.queues_free.push(queue);
    }

    /// Grants the front of a queue whose first place is new: one exclusive place, or the run of shared ones.
    fn grant_front(&mut self, head: u32, granted: &mut impl FnMut(RequestId)) {
        let mut at = head;
        while at != NONE {
            let Place { access, granted: already, next, .. } = self.places[at as usize];
            if already || (access == Access::Exclusive && at != head) {
                // Behind a granted shared place all shared ones up to the next exclusive one are granted too.
                return;
            }
            self.grant(at, granted);
            if access == Access::Exclusive {
                return;
            }
            at = next;
        }
    }

    fn grant(&mut self, place: u32, granted: &mut impl FnMut(RequestId)) {
        self.places[place as usize].granted = true;
        let id = RequestId(place / 3);
        let request = &mut self.requests[id.0 as usize];
        request.waiting -= 1;
        if request.waiting == 0 {
            granted(id);
        }
    }
}

const _: () = assert!(BLOCKS_PER_REQUEST_MAX == 3, "places are numbered by threes");

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn released(order: &mut RangeOrder, id: u32) -> Vec<u32> {
        let mut out = Vec::new();
        order.release(RequestId(id), |granted| out.push(granted.0));
        out
    }

    #[test]
    fn a_write_waits_for_reads_and_holds_later_reads_back() {
        let mut order = RangeOrder::new(8);
        assert_eq!(order.admit(RequestId(0), 1, 5, 5, Access::Shared), Admission::Granted);
        assert_eq!(order.admit(RequestId(1), 1, 5, 6, Access::Shared), Admission::Granted);
        assert_eq!(order.admit(RequestId(2), 1, 5, 5, Access::Exclusive), Admission::Queued);
        assert_eq!(order.admit(RequestId(3), 1, 5, 5, Access::Shared), Admission::Queued);
        assert_eq!(order.admit(RequestId(4), 1, 5, 7, Access::Shared), Admission::Queued);
        assert_eq!(released(&mut order, 1), []);
        assert_eq!(released(&mut order, 0), [2]);
        assert_eq!(released(&mut order, 2), [3, 4]);
        assert_eq!(released(&mut order, 4), []);
        assert_eq!(released(&mut order, 3), []);
        assert!(order.is_empty());
    }

    #[test]
    fn exports_and_disjoint_ranges_do_not_meet() {
        let mut order = RangeOrder::new(4);
        assert_eq!(order.admit(RequestId(0), 1, 5, 5, Access::Exclusive), Admission::Granted);
        assert_eq!(order.admit(RequestId(1), 2, 5, 5, Access::Exclusive), Admission::Granted);
        assert_eq!(order.admit(RequestId(2), 1, 6, 8, Access::Exclusive), Admission::Granted);
        assert_eq!(order.admit(RequestId(3), 1, 4, 5, Access::Exclusive), Admission::Queued);
        assert_eq!(released(&mut order, 0), [3]);
    }

    #[test]
    fn a_duplicate_joins_unless_a_conflicting_request_came_between() {
        let mut order = RangeOrder::new(8);
        order.admit(RequestId(0), 1, 5, 5, Access::Exclusive);
        assert_eq!(order.newest(1, 5).collect::<Vec<_>>(), [RequestId(0)]);
        assert!(order.may_join(RequestId(0), 1, 5, 5));
        order.admit(RequestId(1), 1, 5, 5, Access::Shared);
        assert!(!order.may_join(RequestId(0), 1, 5, 5), "a read has seen the first write");
        order.admit(RequestId(2), 1, 5, 6, Access::Shared);
        assert_eq!(order.newest(1, 5).collect::<Vec<_>>(), [RequestId(2), RequestId(1)]);
        assert!(order.may_join(RequestId(1), 1, 5, 5), "another read is no obstacle");
        order.admit(RequestId(3), 1, 5, 5, Access::Exclusive);
        order.admit(RequestId(4), 1, 5, 5, Access::Shared);
        assert!(!order.may_join(RequestId(1), 1, 5, 5), "a write came between two reads");
        assert_eq!(order.newest(1, 5).collect::<Vec<_>>(), [RequestId(4)]);
        assert!(order.newest(1, 7).next().is_none());
    }

    #[test]
    fn a_request_takes_in_free_blocks_only() {
        let mut order = RangeOrder::new(8);
        order.admit(RequestId(0), 1, 5, 5, Access::Exclusive);
        order.admit(RequestId(1), 1, 7, 7, Access::Exclusive);
        assert!(!order.may_join(RequestId(0), 1, 6, 7), "somebody stands at block 7");
        assert!(order.may_join(RequestId(0), 1, 5, 6));
        order.join(RequestId(0), 1, 5, 6);
        order.join(RequestId(0), 1, 4, 4);
        assert!(!order.may_join(RequestId(0), 1, 3, 3), "three blocks at most");
        assert_eq!(order.admit(RequestId(2), 1, 6, 6, Access::Shared), Admission::Queued);
        assert_eq!(order.admit(RequestId(3), 1, 4, 4, Access::Shared), Admission::Queued);
        assert!(!order.may_join(RequestId(0), 1, 6, 6), "a read waits for the write as it is");
        assert_eq!(released(&mut order, 0).len(), 2);
        assert_eq!(released(&mut order, 1), []);
        assert_eq!((released(&mut order, 2), released(&mut order, 3)), (vec![], vec![]));
        assert!(order.is_empty());
    }

    #[derive(Debug, Clone)]
    struct Step {
        domain: u32,
        first: u64,
        blocks: u64,
        exclusive: bool,
        /// It joins an unfinished request, picked by the number, if it may.
        join: Option<usize>,
        /// Releases, before the next admission, this many of the started requests, picked by the number.
        finish: Vec<usize>,
    }

    fn step() -> impl Strategy<Value = Step> {
        let finish = proptest::collection::vec(0usize..64, 0..3);
        let join = proptest::option::of(0usize..64);
        (0u32..2, 0u64..12, 1u64..=3, any::<bool>(), join, finish).prop_map(
            |(domain, first, blocks, exclusive, join, finish)| Step {
                domain,
                first,
                blocks,
                exclusive,
                join,
                finish,
            },
        )
    }

    /// What the table must do, said as plainly as possible: a request starts when no earlier unfinished one conflicts.
    #[derive(Default)]
    struct Model {
        /// (id, step, started) in order of arrival.
        live: Vec<(u32, Step, bool)>,
    }

    impl Model {
        fn conflict(a: &Step, b: &Step) -> bool {
            a.domain == b.domain
                && (a.exclusive || b.exclusive)
                && a.first < b.first + b.blocks
                && b.first < a.first + a.blocks
        }

        /// Whether `step`, arriving now, may be executed in the place of the request at `at`: nothing unfinished conflicts
        /// with it, but for that request itself and what stands before it at blocks that it has.
        fn may_join(&self, at: usize, step: &Step) -> bool {
            let host = &self.live[at].1;
            let of = |step: &Step| step.first..step.first + step.blocks;
            let shared = of(step).filter(|block| of(host).contains(block)).count() as u64;
            let blocked = of(step).any(|block| {
                let here = Step { first: block, blocks: 1, ..step.clone() };
                let first_in_the_way = if of(host).contains(&block) { at + 1 } else { 0 };
                self.live[first_in_the_way..].iter().any(|(_, other, _)| Self::conflict(other, &here))
            });
            host.domain == step.domain
                && host.exclusive == step.exclusive
                && host.blocks + step.blocks - shared <= 3
                && !blocked
        }

        fn start(&mut self) -> HashSet<u32> {
            let ready: Vec<usize> = (0..self.live.len())
                .filter(|&i| !self.live[i].2)
                .filter(|&i| {
                    self.live[..i].iter().all(|earlier| !Self::conflict(&earlier.1, &self.live[i].1))
                })
                .collect();
            ready
                .into_iter()
                .map(|i| {
                    self.live[i].2 = true;
                    self.live[i].0
                })
                .collect()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        /// 512 cases of up to 400 requests: the table starts exactly what the model starts, at the same step, in any
        /// order of completion, and lets newcomers join exactly where the model does.
        #[test]
        fn agrees_with_the_model(steps in proptest::collection::vec(step(), 1..400)) {
            const MAX: u32 = 64;
            let mut order = RangeOrder::new(MAX);
            let mut free: Vec<u32> = (0..MAX).collect();
            let mut model = Model::default();
            for step in steps {
                let mut finish = step.finish.clone();
                if free.is_empty() {
                    finish.push(0);
                }
                for pick in finish {
                    let started: Vec<usize> = (0..model.live.len()).filter(|&i| model.live[i].2).collect();
                    if started.is_empty() { break; }
                    let (id, _, _) = model.live.remove(started[pick % started.len()]);
                    let granted: HashSet<u32> = released(&mut order, id).into_iter().collect();
                    prop_assert_eq!(granted, model.start());
                    free.push(id);
                }
                let last = step.first + step.blocks - 1;
                let host = step.join.filter(|_| !model.live.is_empty()).map(|pick| pick % model.live.len());
                if let Some(at) = host {
                    let (host, range, _) = model.live[at].clone();
                    if range.domain == step.domain && range.exclusive == step.exclusive {
                        let may = order.may_join(RequestId(host), step.domain, step.first, last);
                        prop_assert_eq!(may, model.may_join(at, &step));
                        let touching = step.first <= range.first + range.blocks && range.first <= last + 1;
                        if may && touching {
                            order.join(RequestId(host), step.domain, step.first, last);
                            let range = &mut model.live[at].1;
                            let end = (range.first + range.blocks).max(last + 1);
                            range.first = range.first.min(step.first);
                            range.blocks = end - range.first;
                            prop_assert!(model.start().is_empty(), "joining starts nobody");
                            continue;
                        }
                    }
                }
                let id = free.pop().unwrap();
                let access = if step.exclusive { Access::Exclusive } else { Access::Shared };
                let admission =
                    order.admit(RequestId(id), step.domain, step.first, last, access);
                model.live.push((id, step, false));
                prop_assert_eq!(admission == Admission::Granted, model.start().contains(&id));
            }
            while let Some(i) = (0..model.live.len()).find(|&i| model.live[i].2) {
                let (id, _, _) = model.live.remove(i);
                let granted: HashSet<u32> = released(&mut order, id).into_iter().collect();
                prop_assert_eq!(granted, model.start());
            }
            prop_assert!(model.live.is_empty() && order.is_empty());
        }
    }
}
