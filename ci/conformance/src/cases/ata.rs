//! ATA commands.

use crate::frames::{EVERYONE, Request};
use crate::world::{EXPORTS, LARGE, MAIN, READ_ONLY, SECTORS_MAX, World};

/// DRDY and ERR, with ABRT.
const ABORTED: (u8, u8) = (0x41, 0x04);
/// DRDY and ERR, with IDNF.
const NOT_FOUND: (u8, u8) = (0x41, 0x10);
const DONE: (u8, u8) = (0x40, 0);

/// Bytes that tell where they belong.
fn pattern(lba: u64, count: u8, generation: u8) -> Vec<u8> {
    let sector = |lba: u64| [&lba.to_le_bytes()[..], &[generation; 504]].concat();
    (lba..lba + u64::from(count)).flat_map(sector).collect()
}

fn write(w: &mut World<'_>, lba: u64, data: &[u8]) {
    assert_eq!(w.ask(Request::write(lba, data)).ata(), DONE);
}

fn check_identity(reply: &crate::frames::Reply, sectors: u64) {
    assert_eq!(reply.size_sectors(), sectors);
    assert_eq!(reply.word(103), 0);
    for word in [83, 86] {
        assert_ne!(reply.word(word) & 1 << 10, 0, "LBA48 in word {word}");
    }
    assert_eq!(reply.word(83) >> 14, 1, "words 82 and 83 are valid");
    let low = u64::from(reply.word(60)) | u64::from(reply.word(61)) << 16;
    assert_eq!(low, sectors.min(0x0fff_ffff));
    // The bytes of each word of a text are swapped.
    let model: String = (27..47).flat_map(|n| reply.word(n).to_be_bytes()).map(char::from).collect();
    assert_eq!(model.trim_end(), "Torus volume");
}

/// What Linux reads.
pub fn case_33_identify(w: &mut World<'_>) {
    let reply = w.ask(Request::identify());
    check_identity(&reply, EXPORTS[MAIN].sectors);
}

/// aoe-sancheck attaches ever larger payloads.
pub fn case_34_identify_with_any_count_and_payload(w: &mut World<'_>) {
    for (count, payload) in [(0, 0), (1, 8192), (0, 512), (255, 0)] {
        let mut request = Request::identify();
        request.argument[2] = count;
        request.argument.resize(12 + payload, 0xa5);
        check_identity(&w.ask(request), EXPORTS[MAIN].sectors);
    }
}

/// Initiators that know no Query Config discover by it.
pub fn case_35_identify_by_everyone(w: &mut World<'_>) {
    let request = w.main(Request::identify());
    let request = Request { shelf: 0xffff, slot: 0xff, dst: EVERYONE, ..request };
    let replies = w.ask_all(&request, EXPORTS.len());
    for plan in EXPORTS {
        let of = |reply: &&crate::frames::Reply| reply.address() == (plan.shelf, plan.slot);
        check_identity(replies.iter().find(of).expect("every export answers"), plan.sectors);
    }
}

/// Larger than 28 bits can say.
pub fn case_36_identify_of_a_large_volume(w: &mut World<'_>) {
    assert!(EXPORTS[LARGE].sectors > 1 << 32);
    let request = w.to(LARGE, Request::identify());
    check_identity(&w.ask_as_is(&request), EXPORTS[LARGE].sectors);
}

/// Exactly the data, and exactly its length.
pub fn case_37_reads_of_every_count(w: &mut World<'_>) {
    let data = pattern(0, SECTORS_MAX, 1);
    write(w, 0, &data);
    for count in 1..=SECTORS_MAX {
        let reply = w.ask(Request::read(0, count));
        assert_eq!(reply.sectors(usize::from(count)), &data[..usize::from(count) * 512]);
    }
}

/// An ATA error: Linux drops AoE errors and waits until the device is dead.
pub fn case_38_one_sector_too_many(w: &mut World<'_>) {
    assert_eq!(w.ask(Request::read(0, SECTORS_MAX + 1)).ata(), ABORTED);
    let too_many = vec![7; (usize::from(SECTORS_MAX) + 1) * 512];
    assert_eq!(w.ask(Request::ata(0x34, 0, SECTORS_MAX + 1, &too_many[..8192])).ata(), ABORTED);
    assert_eq!(w.ask(Request::read(0, 255)).ata(), ABORTED);
    assert_eq!(w.content(MAIN, 0, 1), [0; 512]);
}

/// The last sector is there, the next is not.
pub fn case_39_the_end_of_the_volume(w: &mut World<'_>) {
    let end = EXPORTS[MAIN].sectors;
    assert_eq!(w.ask(Request::read(end - 1, 1)).ata(), DONE);
    assert_eq!(w.ask(Request::read(end - 1, 2)).ata(), NOT_FOUND);
    assert_eq!(w.ask(Request::read(end, 1)).ata(), NOT_FOUND);
    assert_eq!(w.ask(Request::write(end - 1, &[7; 1024])).ata(), NOT_FOUND);
    assert_eq!(w.content(MAIN, end - 1, 1), [0; 512]);
}

/// No sum overflows.
pub fn case_40_far_beyond_the_end(w: &mut World<'_>) {
    let last = (1 << 48) - 1;
    assert_eq!(w.ask(Request::read(last, 255)).ata(), ABORTED);
    assert_eq!(w.ask(Request::read(last, SECTORS_MAX)).ata(), NOT_FOUND);
    assert_eq!(w.ask(Request::read(last, 1)).ata(), NOT_FOUND);
    assert_eq!(w.ask(Request::write(last, &[7; 512])).ata(), NOT_FOUND);
}

/// No address is cut to 31 or 32 bits.
pub fn case_41_reads_beyond_two_tebibytes(w: &mut World<'_>) {
    let places = [0, 1 << 31, (1 << 31) + 7, 1 << 32, (1 << 32) + 7, EXPORTS[LARGE].sectors - 8];
    for (generation, lba) in (1..).zip(places) {
        let request = w.to(LARGE, Request::write(lba, &pattern(lba, 2, generation)));
        assert_eq!(w.ask_as_is(&request).ata(), DONE);
    }
    for (generation, lba) in (1..).zip(places) {
        assert_eq!(w.content(LARGE, lba, 2), pattern(lba, 2, generation));
    }
}

/// The Device register shares a byte with the address.
pub fn case_42_a_28_bit_read_with_device_bits(w: &mut World<'_>) {
    write(w, 8, &pattern(8, 1, 1));
    let mut request = Request::ata(0x20, 8, 1, &[]);
    (request.argument[0], request.argument[7], request.argument[8]) = (0, 0xe0, 0xff);
    assert_eq!(w.ask(request).sectors(1), pattern(8, 1, 1));
    // All 28 bits count.
    let lba = 0x0400_0008;
    let there = w.to(LARGE, Request::write(lba, &pattern(lba, 1, 2)));
    assert_eq!(w.ask_as_is(&there).ata(), DONE);
    let mut request = Request::ata(0x20, lba, 1, &[]);
    (request.argument[0], request.argument[7]) = (0, request.argument[7] | 0xe0);
    let request = w.to(LARGE, request);
    assert_eq!(w.ask_as_is(&request).sectors(1), pattern(lba, 1, 2));
}

/// The answer came, so it is there.
pub fn case_43_a_write_survives_a_crash(w: &mut World<'_>) {
    let data = pattern(100, 2, 9);
    let reply = w.ask(Request::write(100, &data));
    assert_eq!((reply.0.len(), reply.ata()), (60, DONE));
    w.carrier.crash();
    assert_eq!(w.content(MAIN, 100, 2), data);
}

/// Nothing is written that did not come.
pub fn case_44_a_write_with_too_little_data(w: &mut World<'_>) {
    assert_eq!(w.ask(Request::ata(0x34, 0, 2, &[7; 1000])).ata(), ABORTED);
    assert_eq!(w.ask(Request::ata(0x34, 0, 1, &[])).ata(), ABORTED);
    assert_eq!(w.content(MAIN, 0, 2), [0; 1024]);
}

/// Ethernet pads.
pub fn case_45_a_write_with_surplus_data(w: &mut World<'_>) {
    assert_eq!(w.ask(Request::ata(0x34, 0, 1, &[7; 4096])).ata(), DONE);
    assert_eq!(w.content(MAIN, 0, 2), [[7; 512], [0; 512]].concat());
}

/// The W flag does not.
pub fn case_46_the_command_decides_the_direction(w: &mut World<'_>) {
    let mut request = Request::write(0, &[7; 512]);
    request.argument[0] = 0x40;
    assert_eq!(w.ask(request).ata(), DONE);
    let mut request = Request::read(0, 1);
    request.argument[0] = 0x41;
    assert_eq!(w.ask(request).sectors(1), [7; 512]);
}

/// A read that carries as many zeros as it asks for.
pub fn case_47_the_probe_of_linux(w: &mut World<'_>) {
    let data = pattern(0, SECTORS_MAX, 3);
    write(w, 0, &data);
    let zeros = vec![0; data.len()];
    let probe = Request::ata(0x24, 0, SECTORS_MAX, &zeros);
    assert_eq!(w.ask(probe).sectors(usize::from(SECTORS_MAX)), data);
    assert_eq!(w.content(MAIN, 0, SECTORS_MAX), data);
}

/// Refused, and unchanged.
pub fn case_48_a_write_to_a_read_only_export(w: &mut World<'_>) {
    for command in [0x30, 0x34] {
        let request = w.to(READ_ONLY, Request::ata(command, 0, 1, &[7; 512]));
        let (status, _) = w.ask_as_is(&request).ata();
        assert_ne!(status & 0x21, 0);
    }
    assert_eq!(w.content(READ_ONLY, 0, 1), [0; 512]);
}

/// Nobody may be told early.
pub fn case_49_a_write_with_the_async_flag(w: &mut World<'_>) {
    let data = pattern(5, 1, 4);
    let mut request = Request::write(5, &data);
    request.argument[0] |= 0x02;
    assert_eq!(w.ask(request).ata(), DONE);
    w.carrier.crash();
    assert_eq!(w.content(MAIN, 5, 1), data);
}

/// No data, and never 256 sectors.
pub fn case_50_a_count_of_zero(w: &mut World<'_>) {
    for command in [0x20, 0x24, 0x30, 0x34] {
        let reply = w.ask(Request::ata(command, 0, 0, &[7; 4096]));
        assert_eq!((reply.ata(), reply.0.len()), (DONE, 60), "{command:#x}");
    }
    assert_eq!(w.content(MAIN, 0, 8), [0; 4096]);
}

/// Both ways to say it.
pub fn case_51_flush(w: &mut World<'_>) {
    for command in [0xe7, 0xea] {
        assert_eq!(w.ask(Request::ata(command, 0, 0, &[])).ata(), DONE);
    }
}

/// Active.
pub fn case_52_check_power_mode(w: &mut World<'_>) {
    let reply = w.ask(Request::ata(0xe5, 0, 0, &[]));
    assert_eq!((reply.ata(), reply.0[26]), (DONE, 0xff));
}

/// SMART, DMA, anything.
pub fn case_53_commands_that_no_disk_of_ours_has(w: &mut World<'_>) {
    for command in [0xb0, 0xc8, 0xca, 0x25, 0x35, 0xc4, 0xc5, 0x06, 0x00, 0xff] {
        assert_eq!(w.ask(Request::ata(command, 0, 1, &[7; 512])).ata(), ABORTED, "{command:#x}");
    }
    assert_eq!(w.content(MAIN, 0, 1), [0; 512]);
}

/// Not by a wildcard, and not to all stations.
pub fn case_54_a_write_to_everyone(w: &mut World<'_>) {
    for command in [0x30, 0x34] {
        let request = w.main(Request::ata(command, 0, 1, &[7; 512]));
        w.silence(&Request { dst: EVERYONE, ..request.clone() });
        for (shelf, slot) in [(0xffff, 0xff), (1, 0xff), (0xffff, 2)] {
            w.silence(&Request { shelf, slot, ..request.clone() });
            w.silence(&Request { shelf, slot, dst: EVERYONE, ..request.clone() });
        }
    }
    assert_eq!(w.content(MAIN, 0, 1), [0; 512]);
}

/// Eight writers in one block of 4 KiB, and one across two.
pub fn case_56_single_sectors_beside_each_other(w: &mut World<'_>) {
    let sectors = [5, 3, 0, 7, 1, 6, 2, 4];
    let requests: Vec<_> = sectors.map(|lba| w.main(Request::write(lba, &pattern(lba, 1, 1)))).into();
    let across = w.main(Request::write(15, &pattern(15, 2, 2)));
    for request in requests.iter().chain([&across]) {
        w.send(request);
    }
    for request in requests.iter().chain([&across]) {
        assert_eq!(w.answer(request).ata(), DONE);
    }
    assert_eq!(w.content(MAIN, 0, 8), pattern(0, 8, 1));
    assert_eq!(w.content(MAIN, 14, 4), [vec![0; 512], pattern(15, 2, 2), vec![0; 512]].concat());
}
