//! The ring against real files: O_DIRECT on the file system of the build folder, inline on tmpfs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use af_xdp::region::{Pool, Region, RegionConfig};
use torus_uring::{
    BLOCK_BYTES, BLOCKS_LONG_MAX, BLOCKS_MAX, Blocks, Event, Finished, IoError, Ring, RingConfig,
    read_inline, write_inline,
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

/// Chunks of a region of 1024, the next always far from the one before it.
fn scattered(pool: &mut Pool, count: usize, first_byte: usize) -> Blocks {
    let mut all: Vec<_> = std::iter::from_fn(|| pool.take_chunk()).collect();
    assert!(all.len() > count);
    let mut blocks = Blocks::with_capacity(count);
    let mut at = 0;
    for block in 0..count {
        at = (at + 389) % all.len();
        let mut chunk = all.swap_remove(at);
        pool.bytes_mut(&mut chunk).fill(byte_of(first_byte + block));
        blocks.push(chunk);
    }
    all.into_iter().for_each(|chunk| pool.release(chunk));
    blocks
}

fn byte_of(block: usize) -> u8 {
    u8::try_from(block % 251).unwrap()
}

fn large_ring() -> (Ring, Pool) {
    let region = Region::new(RegionConfig { cores: 1, chunks_per_core: 1024, headers_per_core: 64 }).unwrap();
    let ring = Ring::new(RingConfig { requests_max: 128 }, &region, None).unwrap();
    let pool = region.pool(0).unwrap();
    (ring, pool)
}

#[test]
fn long_requests_move_what_they_name() {
    let (mut ring, mut pool) = large_ring();
    let (_path, file) = direct_file(600);
    let id = ring.register_file(file.as_fd()).unwrap();
    for (round, count) in [3, 4, 5, 100, 255, 256, 1, 256, 4].into_iter().enumerate() {
        let first_byte = 7 * round;
        let offset = (1 + 31 * round as u64) * BLOCK_BYTES as u64;
        let blocks = scattered(&mut pool, count, first_byte);
        let order: Vec<u64> = blocks.iter().map(|chunk| chunk.offset()).collect();
        ring.write(id, offset, blocks, round % 2 == 0, 1).unwrap();
        let written = wait(&mut ring);
        assert_eq!(written.result, Ok(()));
        assert_eq!(order, written.blocks.iter().map(|chunk| chunk.offset()).collect::<Vec<_>>());
        first_bytes(&mut pool, written.blocks);
        let target = scattered(&mut pool, count, 0);
        ring.read(&pool, id, offset, target, 2).unwrap();
        let read = wait(&mut ring);
        assert_eq!(read.result, Ok(()));
        let expected: Vec<u8> = (first_byte..first_byte + count).map(byte_of).collect();
        assert_eq!(first_bytes(&mut pool, read.blocks), expected);
    }
    assert_eq!(pool.free_chunks(), pool.chunk_capacity());
}

#[test]
fn a_long_request_that_ends_short_is_an_error() {
    let (mut ring, mut pool) = large_ring();
    let (_path, file) = direct_file(150);
    let id = ring.register_file(file.as_fd()).unwrap();
    let blocks = scattered(&mut pool, 256, 0);
    ring.read(&pool, id, 50 * BLOCK_BYTES as u64, blocks, 1).unwrap();
    let short = wait(&mut ring);
    assert_eq!(short.result, Err(IoError::Short { done_bytes: 100 * BLOCK_BYTES }));
    assert_eq!(short.blocks.len(), 256);
    release(&mut pool, short.blocks);
    // The vectors of the long request are no longer looked at.
    let blocks = scattered(&mut pool, 2, 0);
    ring.read(&pool, id, 0, blocks, 2).unwrap();
    let read = wait(&mut ring);
    assert_eq!(read.result, Ok(()));
    assert_eq!(first_bytes(&mut pool, read.blocks), [0, 0]);
}

fn release(pool: &mut Pool, blocks: Blocks) {
    blocks.into_iter().for_each(|chunk| pool.release(chunk));
}

/// More at a time than the ring has vectors for beforehand, twice: the second time the added ones are used again.
#[test]
fn more_long_requests_than_vectors_were_made_for() {
    let (mut ring, mut pool) = large_ring();
    let (_path, file) = direct_file(1000);
    let id = ring.register_file(file.as_fd()).unwrap();
    let offset = |token: usize| (token * 8 * BLOCK_BYTES) as u64;
    for round in 0..2 {
        for token in 0..100 {
            let blocks = scattered(&mut pool, 7, token + round);
            ring.write(id, offset(token), blocks, false, token as u64).unwrap();
        }
        for _ in 0..100 {
            let written = wait(&mut ring);
            assert_eq!(written.result, Ok(()));
            first_bytes(&mut pool, written.blocks);
        }
        for token in 0..100 {
            let blocks = scattered(&mut pool, 7, 0);
            ring.read(&pool, id, offset(token), blocks, token as u64).unwrap();
        }
        for _ in 0..100 {
            let read = wait(&mut ring);
            assert_eq!(read.result, Ok(()));
            let first = usize::try_from(read.token).unwrap() + round;
            let expected: Vec<u8> = (first..first + 7).map(byte_of).collect();
            assert_eq!(first_bytes(&mut pool, read.blocks), expected);
        }
    }
}

/// A registered buffer ends at 1 GiB: a request with chunks on both sides names no buffer.
#[test]
fn a_long_request_across_registered_pieces() {
    let chunks = (1 << 30) / BLOCK_BYTES + 512;
    let config =
        RegionConfig { cores: 1, chunks_per_core: u32::try_from(chunks).unwrap(), headers_per_core: 64 };
    let region = Region::new(config).unwrap();
    let mut ring = Ring::new(RingConfig { requests_max: 8 }, &region, None).unwrap();
    let mut pool = region.pool(0).unwrap();
    let mut all: Vec<_> = std::iter::from_fn(|| pool.take_chunk()).collect();
    let mut high = all.split_off(all.len() - 300);
    assert!(high[0].offset() >= 1 << 30);
    let (_path, file) = direct_file(256);
    let id = ring.register_file(file.as_fd()).unwrap();
    let mut mixed = |pool: &mut Pool, first: usize| -> Blocks {
        (0..256)
            .map(|block| {
                let mut chunk = if block % 3 == 0 { high.pop() } else { all.pop() }.unwrap();
                pool.bytes_mut(&mut chunk).fill(byte_of(first + block));
                chunk
            })
            .collect()
    };
    let blocks = mixed(&mut pool, 9);
    ring.write(id, 0, blocks, true, 1).unwrap();
    let written = wait(&mut ring);
    assert_eq!(written.result, Ok(()));
    let target = mixed(&mut pool, 0);
    ring.read(&pool, id, 0, target, 2).unwrap();
    let read = wait(&mut ring);
    assert_eq!(read.result, Ok(()));
    assert_eq!(first_bytes(&mut pool, read.blocks), (9..265).map(byte_of).collect::<Vec<_>>());
    first_bytes(&mut pool, written.blocks);
}

#[test]
fn long_inline_requests_move_the_same_bytes() {
    let (_ring, mut pool) = large_ring();
    let file = tempfile::tempfile_in("/dev/shm").expect("/dev/shm is a tmpfs on every Linux system");
    file.set_len(300 * BLOCK_BYTES as u64).unwrap();
    for count in [4, 100, 256] {
        let blocks = scattered(&mut pool, count, count);
        write_inline(file.as_fd(), BLOCK_BYTES as u64, &blocks, &pool).unwrap();
        first_bytes(&mut pool, blocks);
        let mut back = scattered(&mut pool, count, 0);
        read_inline(file.as_fd(), BLOCK_BYTES as u64, &mut back, &pool).unwrap();
        let expected: Vec<u8> = (count..2 * count).map(byte_of).collect();
        assert_eq!(first_bytes(&mut pool, back), expected);
    }
    let mut beyond = scattered(&mut pool, 256, 0);
    let short = read_inline(file.as_fd(), 290 * BLOCK_BYTES as u64, &mut beyond, &pool);
    assert_eq!(short, Err(IoError::Short { done_bytes: 10 * BLOCK_BYTES }));
    release(&mut pool, beyond);
}

#[test]
fn a_list_of_any_length_keeps_its_order() {
    let (_ring, mut pool) = large_ring();
    let of = |pool: &mut Pool, count| scattered(pool, count, 0);
    let offsets = |blocks: &Blocks| blocks.iter().map(|chunk| chunk.offset()).collect::<Vec<_>>();
    for count in [0, 1, 2, 3, 4, 5, 100, BLOCKS_LONG_MAX] {
        for at in [0, 1, 2, 3, 4, 99, count] {
            let mut blocks = of(&mut pool, count);
            let order = offsets(&blocks);
            assert_eq!((blocks.len(), blocks.len_bytes()), (count, count * BLOCK_BYTES));
            if at > count {
                release(&mut pool, blocks);
                continue;
            }
            let tail = blocks.split_off(at);
            assert_eq!((offsets(&blocks), offsets(&tail)), (order[..at].to_vec(), order[at..].to_vec()));
            blocks.append(tail);
            assert_eq!(offsets(&blocks), order);
            for (index, &offset) in order.iter().enumerate() {
                assert_eq!((blocks.get(index).offset(), blocks.get_mut(index).offset()), (offset, offset));
            }
            if let Some(mut first) = blocks.remove_first() {
                assert_eq!((first.offset(), offsets(&blocks)), (order[0], order[1..].to_vec()));
                if let Some(last) = blocks.pop() {
                    assert_eq!(last.offset(), order[count - 1]);
                    blocks.push(last);
                }
                if !blocks.is_empty() {
                    let second = blocks.replace(0, first);
                    assert_eq!((second.offset(), blocks.get(0).offset()), (order[1], order[0]));
                    first = blocks.replace(0, second);
                }
                pool.release(first);
            } else {
                assert!(blocks.is_empty() && count == 0 && blocks.pop().is_none());
            }
            let rest = blocks.into_iter().map(|chunk| {
                let offset = chunk.offset();
                pool.release(chunk);
                offset
            });
            assert_eq!(rest.collect::<Vec<_>>(), order.get(1..).unwrap_or_default());
        }
    }
    assert_eq!(pool.free_chunks(), pool.chunk_capacity());
    assert_eq!(size_of::<Blocks>(), 32);
    assert_eq!(BLOCKS_MAX, 3);
}

#[test]
fn a_list_is_never_longer_than_the_longest_request() {
    let (_ring, mut pool) = large_ring();
    let caught = |act: &mut dyn FnMut()| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).expect_err("too long");
    };
    let mut blocks = scattered(&mut pool, BLOCKS_LONG_MAX, 0);
    caught(&mut || blocks.push(pool.take_chunk().unwrap()));
    caught(&mut || blocks.append(scattered(&mut pool, 1, 0)));
    caught(&mut || drop(Blocks::with_capacity(BLOCKS_LONG_MAX + 1)));
    assert_eq!(blocks.len(), BLOCKS_LONG_MAX);
    first_bytes(&mut pool, blocks);
}

/// Requests of a few blocks allocate nothing, and neither do long ones once their list is made.
#[test]
fn requests_do_not_allocate() {
    let (mut ring, mut pool) = large_ring();
    let (_path, file) = direct_file(300);
    let id = ring.register_file(file.as_fd()).unwrap();
    let long = scattered(&mut pool, 256, 0);
    let mut lists = vec![long];
    let measured = allocation_counter::measure(|| {
        let mut few: Blocks = (0..2).map(|_| pool.take_chunk().unwrap()).collect();
        let mut tail = few.split_off(1);
        tail.push(pool.take_chunk().unwrap());
        few.append(tail);
        assert_eq!(few.len(), BLOCKS_MAX);
        ring.read(&pool, id, 0, few, 1).unwrap();
        ring.read(&pool, id, 0, lists.pop().unwrap(), 2).unwrap();
        for _ in 0..2 {
            let ended = wait(&mut ring);
            assert_eq!(ended.result, Ok(()));
            if ended.token == 1 {
                ended.blocks.into_iter().for_each(|chunk| pool.release(chunk));
            } else {
                lists.push(ended.blocks);
            }
        }
    });
    assert_eq!(measured.count_total, 0);
    release(&mut pool, lists.pop().unwrap());
}
