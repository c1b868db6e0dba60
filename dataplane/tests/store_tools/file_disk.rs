//! A disk that does every request at once on a real file, and a shard brought to rest on it: for tests that need a store with
//! something on it.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd;

use af_xdp::region::{Pool, Region, RegionConfig};
use torus_dataplane::store::extent::shard::{Shard, WriteTerms};
use torus_dataplane::store::{Disk, Durable, Outcome, RequestToken, StoreError, release_blocks};
use torus_uring::{Blocks, IoError, read_inline, write_inline};

/// See the module.
pub(crate) struct FileDisk {
    file: File,
    pool: Pool,
    ended: VecDeque<(u64, Blocks, Result<(), IoError>)>,
    /// Keep back what need not be durable at its end, data on their way to their place above all: as a crash finds it.
    pub(crate) withhold_unsynced: bool,
    withheld: Vec<Blocks>,
    now_ns: u64,
}

impl FileDisk {
    /// On a file opened for reading and writing, with frame memory of its own.
    pub(crate) fn new(file: File) -> FileDisk {
        let config = RegionConfig { cores: 1, chunks_per_core: 8192, headers_per_core: 64 };
        let pool = Region::new(config).unwrap().pool(0).unwrap();
        let (ended, withheld) = (VecDeque::new(), Vec::new());
        FileDisk { file, pool, ended, withhold_unsynced: false, withheld, now_ns: 0 }
    }

    /// Writes whole blocks of a layer, each filled with its byte, and waits for the outcome.
    pub(crate) fn write_blocks(
        &mut self,
        shard: &mut Shard,
        object: u32,
        first_block: u64,
        fills: &[u8],
        terms: WriteTerms,
    ) -> Result<(), StoreError> {
        let chunks = fills.iter().map(|fill| {
            let mut chunk = self.pool.take_chunk().unwrap();
            self.pool.bytes_mut(&mut chunk).fill(*fill);
            chunk
        });
        let blocks: Blocks = chunks.collect();
        let mut outcomes = Vec::new();
        shard.write(RequestToken(1), object, first_block, blocks, terms, self, &mut outcomes);
        self.turn_until(shard, &mut outcomes, |outcomes| !outcomes.is_empty());
        let outcome = outcomes.pop().unwrap();
        release_blocks(&mut self.pool, outcome.blocks);
        outcome.result
    }

    /// Has a shard do something that needs no memory of frames, and waits for the outcome.
    pub(crate) fn run(
        &mut self,
        shard: &mut Shard,
        begin: impl FnOnce(&mut Shard, RequestToken),
    ) -> Result<(), StoreError> {
        let mut outcomes = Vec::new();
        begin(shard, RequestToken(1));
        self.turn_until(shard, &mut outcomes, |outcomes| !outcomes.is_empty());
        outcomes.pop().unwrap().result
    }

    /// Brings a shard to rest and takes it apart.
    pub(crate) fn close(&mut self, mut shard: Box<Shard>) {
        shard.close();
        for _ in 0..1000 {
            if shard.is_closed() {
                shard.dissolve(&mut self.pool);
                return;
            }
            self.turn(&mut shard, &mut Vec::new());
        }
        panic!("the shard never came to rest");
    }

    /// Ends a shard as a crash does.
    pub(crate) fn crash(&mut self, shard: Box<Shard>) {
        shard.abandon(&mut self.pool);
        for (_, blocks, _) in self.ended.drain(..) {
            release_blocks(&mut self.pool, blocks);
        }
        for blocks in self.withheld.drain(..) {
            release_blocks(&mut self.pool, blocks);
        }
    }

    fn turn_until(
        &mut self,
        shard: &mut Shard,
        outcomes: &mut Vec<Outcome>,
        done: impl Fn(&[Outcome]) -> bool,
    ) {
        for _ in 0..1000 {
            if done(outcomes) {
                return;
            }
            self.turn(shard, outcomes);
        }
        panic!("the request never ended");
    }

    fn turn(&mut self, shard: &mut Shard, outcomes: &mut Vec<Outcome>) {
        self.now_ns += 1_000_000;
        shard.turn(self.now_ns, self, outcomes);
        while let Some((token, blocks, result)) = self.ended.pop_front() {
            shard.finished(token, blocks, result, self, outcomes);
        }
    }
}

impl Disk for FileDisk {
    fn read(&mut self, offset_bytes: u64, mut blocks: Blocks, token: u64) {
        let result = read_inline(self.file.as_fd(), offset_bytes, &mut blocks, &self.pool);
        self.ended.push_back((token, blocks, result));
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, until: Durable, token: u64) {
        if self.withhold_unsynced && until == Durable::AtSync {
            self.withheld.push(blocks);
            return;
        }
        let result = write_inline(self.file.as_fd(), offset_bytes, &blocks, &self.pool);
        self.ended.push_back((token, blocks, result));
    }

    fn sync(&mut self, token: u64) {
        let result = self.file.sync_data();
        let result = result.map_err(|error| IoError::Errno(error.raw_os_error().unwrap_or(5)));
        self.ended.push_back((token, Blocks::new(), result));
    }

    fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }
}
