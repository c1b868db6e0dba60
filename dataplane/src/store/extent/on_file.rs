//! A store on a real file whose shards are all driven by one thread, for tests: each disk request ends before the next one
//! begins, and time passes as fast as it can.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use af_xdp::region::{Pool, Region, RegionConfig};
use torus_uring::{Blocks, read_inline, write_inline};

use super::ExtentStore;
use super::shard::{Object, Shard};
use crate::store::{
    BLOCK_BYTES, Crcs, Disk, Durable, Operation, Outcome, RequestToken, Store, StoreError, release_blocks,
};

/// How far time goes on at each turn.
const TURN_NS: u64 = 50_000_000;

type End = (u64, Blocks, Result<(), torus_uring::IoError>);

/// A file that ends every request at once.
struct FileDisk<'d> {
    file: &'d OwnedFd,
    pool: &'d mut Pool,
    ends: &'d mut Vec<End>,
}

impl Disk for FileDisk<'_> {
    fn read(&mut self, offset_bytes: u64, mut blocks: Blocks, token: u64) {
        let result = read_inline(self.file.as_fd(), offset_bytes, &mut blocks, self.pool);
        self.ends.push((token, blocks, result));
    }

    fn write(&mut self, offset_bytes: u64, blocks: Blocks, _until: Durable, token: u64) {
        let result = write_inline(self.file.as_fd(), offset_bytes, &blocks, self.pool);
        self.ends.push((token, blocks, result));
    }

    fn sync(&mut self, token: u64) {
        self.ends.push((token, Blocks::new(), Ok(())));
    }

    fn pool(&mut self) -> &mut Pool {
        self.pool
    }
}

/// What cores have of one store.
pub(crate) struct Driven {
    pool: Pool,
    file: Arc<OwnedFd>,
    store: ExtentStore,
    ends: Vec<End>,
    outcomes: Vec<Outcome>,
    now_ns: u64,
}

impl Driven {
    /// Takes the shards of the store in `file`, which is open for direct I/O.
    pub(crate) fn new(file: Arc<OwnedFd>, shards: impl IntoIterator<Item = Box<Shard>>) -> Driven {
        let config = RegionConfig { cores: 1, chunks_per_core: 1024, headers_per_core: 64 };
        let mut store = ExtentStore::new();
        shards.into_iter().for_each(|shard| store.adopt(shard));
        Driven {
            pool: Region::new(config).unwrap().pool(0).unwrap(),
            file,
            store,
            ends: Vec::new(),
            outcomes: Vec::new(),
            now_ns: 1,
        }
    }

    /// Lets time go on, and what has ended meet the store.
    pub(crate) fn turn(&mut self) {
        let Driven { pool, file, store, ends, outcomes, now_ns } = self;
        *now_ns += TURN_NS;
        while let Some((token, blocks, result)) = ends.pop() {
            store.finished(token, blocks, result, &mut FileDisk { file, pool, ends }, outcomes);
        }
        store.turn(*now_ns, &mut FileDisk { file, pool, ends }, outcomes);
    }

    /// One request, until it has ended.
    fn run(&mut self, object: Object, operation: Operation) -> Result<Blocks, StoreError> {
        let Driven { pool, file, store, ends, outcomes, .. } = self;
        let mut disk = FileDisk { file, pool, ends };
        store.start(RequestToken(0), &object, operation, &mut disk, outcomes);
        self.end()
    }

    /// One request that needs no memory of frames, until it has ended.
    pub(crate) fn ask(
        &mut self,
        begin: impl FnOnce(&mut ExtentStore, RequestToken),
    ) -> Result<(), StoreError> {
        begin(&mut self.store, RequestToken(0));
        self.end().map(|blocks| release_blocks(&mut self.pool, blocks))
    }

    /// What cores have of the store.
    pub(crate) fn store(&mut self) -> &mut ExtentStore {
        &mut self.store
    }

    /// Goes on until the one request has ended.
    fn end(&mut self) -> Result<Blocks, StoreError> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.outcomes.is_empty() {
            assert!(Instant::now() < deadline, "a request never ends");
            self.turn();
        }
        let outcome = self.outcomes.pop().unwrap();
        match outcome.result {
            Ok(()) => Ok(outcome.blocks),
            Err(error) => {
                release_blocks(&mut self.pool, outcome.blocks);
                Err(error)
            }
        }
    }

    /// Fills a block with a byte.
    pub(crate) fn write(&mut self, object: Object, block: u64, byte: u8) -> Result<(), StoreError> {
        let mut chunk = self.pool.take_chunk().unwrap();
        self.pool.bytes_mut(&mut chunk).fill(byte);
        let blocks = Blocks::from_iter([chunk]);
        let crcs = Crcs::default();
        let operation =
            Operation::Write { first_block: block, blocks, keep_head_bytes: 0, keep_tail_bytes: 0, crcs };
        self.run(object, operation).map(|blocks| release_blocks(&mut self.pool, blocks))
    }

    /// What every byte of a block is.
    pub(crate) fn read(&mut self, object: Object, block: u64) -> u8 {
        let blocks = Blocks::from_iter([self.pool.take_chunk().unwrap()]);
        let blocks = self.run(object, Operation::Read { first_block: block, blocks }).unwrap();
        let bytes = self.pool.region().bytes(blocks.get(0)).to_vec();
        release_blocks(&mut self.pool, blocks);
        assert!(bytes.len() == BLOCK_BYTES && bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    }

    /// Brings the store to rest, as cores do before they let it go.
    pub(crate) fn close(mut self) {
        self.store.close();
        while !self.store.is_closed() {
            self.turn();
        }
        self.store.dissolve(&mut self.pool);
        assert_eq!(self.pool.free_chunks(), self.pool.chunk_capacity(), "every chunk is back");
    }

    /// Lets go of everything as a process does that is killed: nothing is finished.
    pub(crate) fn kill(self) {
        // Their chunks have no other home to go to.
        std::mem::forget((self.store, self.ends));
    }

    /// Begins to take from a layer every block from `from_block` on.
    pub(crate) fn unmap(&mut self, object: Object, from_block: u64) {
        self.store.unmap(object, from_block);
    }
}
