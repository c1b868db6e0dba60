//! The ring against real files: O_DIRECT on the file system of the build folder, inline on tmpfs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use af_xdp::region::{Pool, Region, RegionConfig};
use torus_uring::{
    BLOCK_BYTES, Blocks, Event, Finished, IoError, Ring, RingConfig, read_inline, write_inline,
};

fn ring() -> (Ring, Pool) {
    let region = Region::new(RegionConfig { cores: 1, chunks_per_core: 64, headers_per_core: 64 }).unwrap();
    let ring = Ring::new(RingConfig { requests_max: 8 }, &region, None).unwrap();
    let pool = region.pool(0).unwrap();
    (ring, pool)
}

fn direct_file(len_blocks: usize) -> (tempfile::TempPath, File) {
    let path = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap().into_temp_path();
    std::fs::write(&path, vec![0u8; len_blocks * BLOCK_BYTES]).unwrap();
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    (path, file)
}

fn filled(pool: &mut Pool, bytes: &[u8]) -> Blocks {
    bytes
        .iter()
        .map(|&byte| {
            let mut chunk = pool.take_chunk().unwrap();
            pool.bytes_mut(&mut chunk).fill(byte);
            chunk
        })
        .collect()
}

fn first_bytes(pool: &mut Pool, mut blocks: Blocks) -> Vec<u8> {
    let bytes = blocks.iter().map(|chunk| {
        let bytes = pool.region().bytes(chunk);
        assert!(bytes.iter().all(|&b| b == bytes[0]));
        bytes[0]
    });
    let bytes = bytes.collect();
    while let Some(chunk) = blocks.pop() {
        pool.release(chunk);
    }
    bytes
}

fn wait(ring: &mut Ring) -> Finished {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(Event::Disk(finished)) = ring.next_event() {
            return finished;
        }
        assert!(Instant::now() < deadline, "the request never ended");
        ring.submit_and_wait(Duration::from_secs(1)).unwrap();
    }
}

#[test]
fn what_is_written_is_read_back() {
    let (mut ring, mut pool) = ring();
    let (_path, file) = direct_file(8);
    let id = ring.register_file(file.as_fd()).unwrap();
    for (dsync, bytes) in [(false, vec![1u8]), (true, vec![2]), (true, vec![3, 4, 5])] {
        let count = bytes.len();
        let offset = BLOCK_BYTES as u64;
        ring.write(id, offset, filled(&mut pool, &bytes), dsync, 70).unwrap();
        let written = wait(&mut ring);
        assert_eq!((written.token, written.result), (70, Ok(())));
        first_bytes(&mut pool, written.blocks);
        let target = filled(&mut pool, &vec![0xee; count]);
        ring.read(&pool, id, offset, target, 71).unwrap();
        let read = wait(&mut ring);
        assert_eq!((read.token, read.result), (71, Ok(())));
        assert_eq!(first_bytes(&mut pool, read.blocks), bytes);
    }
    ring.sync(id, 72).unwrap();
    assert_eq!(wait(&mut ring).result, Ok(()));
    assert_eq!(ring.in_flight(), 0);
    assert_eq!(pool.free_chunks(), pool.chunk_capacity());
}

#[test]
fn reading_past_the_end_is_an_error_not_stale_bytes() {
    let (mut ring, mut pool) = ring();
    let (_path, file) = direct_file(2);
    let id = ring.register_file(file.as_fd()).unwrap();
    let blocks = filled(&mut pool, &[9, 9]);
    ring.read(&pool, id, BLOCK_BYTES as u64, blocks, 1).unwrap();
    let short = wait(&mut ring);
    assert_eq!(short.result, Err(IoError::Short { done_bytes: BLOCK_BYTES }));
    let blocks = filled(&mut pool, &[9]);
    ring.read(&pool, id, 1 << 40, blocks, 1).unwrap();
    assert_eq!(wait(&mut ring).result, Err(IoError::Short { done_bytes: 0 }));
}

#[test]
fn a_full_ring_hands_the_blocks_back() {
    let (mut ring, mut pool) = ring();
    let (_path, file) = direct_file(8);
    let id = ring.register_file(file.as_fd()).unwrap();
    for token in 0..8 {
        let blocks = filled(&mut pool, &[0]);
        ring.read(&pool, id, 0, blocks, token).unwrap();
    }
    let blocks = filled(&mut pool, &[7]);
    let refused = ring.read(&pool, id, 0, blocks, 8).unwrap_err();
    assert_eq!(first_bytes(&mut pool, refused), [7]);
    assert!(ring.sync(id, 9).is_err());
    let mut tokens: Vec<u64> = (0..8).map(|_| wait(&mut ring).token).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..8).collect::<Vec<_>>());
}

#[test]
fn a_file_that_is_gone_fails_and_the_ring_goes_on() {
    let (mut ring, mut pool) = ring();
    let (_path, file) = direct_file(8);
    let gone = ring.register_file(file.as_fd()).unwrap();
    ring.unregister_file(gone);
    let blocks = filled(&mut pool, &[0]);
    ring.read(&pool, gone, 0, blocks, 1).unwrap();
    assert_eq!(wait(&mut ring).result, Err(IoError::Errno(libc::EBADF)));
    let again = ring.register_file(file.as_fd()).unwrap();
    let blocks = filled(&mut pool, &[1]);
    ring.read(&pool, again, 0, blocks, 2).unwrap();
    assert_eq!(wait(&mut ring).result, Ok(()));
}

#[test]
fn another_ring_and_a_descriptor_wake_a_sleeper() {
    let region = Region::new(RegionConfig { cores: 2, chunks_per_core: 64, headers_per_core: 64 }).unwrap();
    let (handles, sleeper_handle) = std::sync::mpsc::channel();
    let in_thread = std::sync::Arc::clone(&region);
    let sleeper = std::thread::spawn(move || {
        let mut ring = Ring::new(RingConfig { requests_max: 8 }, &in_thread, None).unwrap();
        handles.send(ring.wake_handle().unwrap()).unwrap();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let started = Instant::now();
        ring.submit_and_wait(Duration::from_secs(20)).unwrap();
        assert!(matches!(ring.next_event(), Some(Event::Woken)));
        ring.poll(reader.as_fd(), 33);
        ring.submit().unwrap();
        assert!(ring.next_event().is_none());
        std::io::Write::write_all(&mut writer, b"x").unwrap();
        ring.submit_and_wait(Duration::from_secs(20)).unwrap();
        assert!(matches!(ring.next_event(), Some(Event::Ready(33))));
        assert!(started.elapsed() < Duration::from_secs(15), "woken, not timed out");
    });
    let handle = sleeper_handle.recv().unwrap();
    // Shares the other ring's registered memory, and can use it.
    let mut ring = Ring::new(RingConfig { requests_max: 8 }, &region, Some(&handle)).unwrap();
    let mut pool = region.pool(1).unwrap();
    let (_path, file) = direct_file(1);
    let id = ring.register_file(file.as_fd()).unwrap();
    let blocks = filled(&mut pool, &[5]);
    ring.read(&pool, id, 0, blocks, 1).unwrap();
    assert_eq!(wait(&mut ring).result, Ok(()));
    ring.wake(&handle);
    ring.submit().unwrap();
    sleeper.join().unwrap();
}

#[test]
fn a_wait_without_events_ends_by_its_timeout() {
    let (mut ring, _pool) = ring();
    let started = Instant::now();
    ring.submit_and_wait(Duration::from_millis(30)).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(29));
    assert!(ring.next_event().is_none());
}

#[test]
fn inline_requests_move_the_same_bytes() {
    let (_ring, mut pool) = ring();
    let file = tempfile::tempfile_in("/dev/shm").expect("/dev/shm is a tmpfs on every Linux system");
    file.set_len(4 * BLOCK_BYTES as u64).unwrap();
    let blocks = filled(&mut pool, &[1, 2, 3]);
    write_inline(file.as_fd(), BLOCK_BYTES as u64, &blocks, &pool).unwrap();
    let mut back = filled(&mut pool, &[9, 9]);
    read_inline(file.as_fd(), 2 * BLOCK_BYTES as u64, &mut back, &pool).unwrap();
    assert_eq!(first_bytes(&mut pool, back), [2, 3]);
    let mut beyond = filled(&mut pool, &[9, 9]);
    let short = read_inline(file.as_fd(), 3 * BLOCK_BYTES as u64, &mut beyond, &pool);
    assert_eq!(short, Err(IoError::Short { done_bytes: BLOCK_BYTES }));
    first_bytes(&mut pool, blocks);
}
