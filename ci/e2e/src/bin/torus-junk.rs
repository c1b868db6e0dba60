//! `torus-junk INTERFACE DESTINATION-MAC SHELF.SLOT FRAMES SEED`: a hostile neighbour, who sends malformed AoE frames as fast
//! as one socket does.
//!
//! Truncated, mutated and random frames, frames with impossible lengths, counts, addresses and tags, from invented stations
//! and in other VLANs. Some are well formed by chance and may write: to SHELF.SLOT only, which must be an export of no
//! value.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use torus_e2e::port::Port;
use torus_e2e::random::Random;

/// Longest frame: what an MTU of 9000 takes.
const FRAME_MAX: usize = 9014;
/// Frames sent at a time.
const BURST: u64 = 32;

struct Aim {
    destination: [u8; 6],
    source: [u8; 6],
    shelf: u16,
    slot: u8,
}

/// A valid request: Query Config, IDENTIFY, READ, WRITE, FLUSH, MAC mask or reserve, in both addressings.
fn template(random: &mut Random, aim: &Aim) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_MAX);
    let broadcast = random.below(8) == 0;
    frame.extend_from_slice(if broadcast { &[0xff; 6] } else { &aim.destination });
    let invented = [0x02, 0xff, random.byte(), random.byte(), random.byte(), random.byte()];
    frame.extend_from_slice(if random.below(2) == 0 { &invented } else { &aim.source });
    frame.extend_from_slice(&[0x88, 0xa2, 0x10, 0]);
    frame.extend_from_slice(&aim.shelf.to_be_bytes());
    frame.push(aim.slot);
    let command = [0, 0, 0, 0, 1, 2, 3, 4][random.below(8)];
    frame.push(command);
    frame.extend_from_slice(&random.next_u64().to_le_bytes()[..4]);
    if command == 0 {
        let ata = [0x20, 0x24, 0x30, 0x34, 0xec, 0xe7, 0xea, 0xe5][random.below(8)];
        let sectors = u8::try_from(random.below(18)).expect("small");
        let write = u8::from(ata == 0x30 || ata == 0x34);
        let lba = (random.next_u64() >> random.below(64)).to_le_bytes();
        frame.extend_from_slice(&[0x40 | write, random.byte() & 1, sectors, ata]);
        frame.extend_from_slice(&lba[..6]);
        frame.extend_from_slice(&[0, 0]);
        if write == 1 {
            frame.resize((frame.len() + usize::from(sectors) * 512).min(FRAME_MAX), 0x5a);
        }
    } else {
        for _ in 0..8 + random.below(64) {
            frame.push(random.byte());
        }
    }
    frame
}

/// Breaks a frame in one of several ways.
fn spoil(random: &mut Random, frame: &mut Vec<u8>) {
    match random.below(6) {
        0 => frame.truncate(14 + random.below(frame.len().saturating_sub(14).max(1))),
        1 => {
            for _ in 0..=random.below(8) {
                let at = 14 + random.below(frame.len() - 14);
                frame[at] ^= 1 << random.below(8);
            }
        }
        2 => {
            let at = 14 + random.below((frame.len() - 14).min(24));
            frame[at] = [0x00, 0x7f, 0x80, 0xff][random.below(4)];
        }
        3 => frame.resize(14 + random.below(FRAME_MAX - 14), 0xff),
        4 => {
            frame.truncate(14);
            for _ in 0..random.below(200) {
                frame.push(random.byte());
            }
        }
        _ => {} // as it is: a valid request now and then
    }
}

/// Keeps a frame off every export but the one of no value: what is well formed by chance must not write elsewhere.
fn confine(frame: &mut [u8], aim: &Aim) {
    if frame.len() > 18 {
        let shelf = u16::from_be_bytes([frame[16], frame[17]]);
        let mine = shelf == aim.shelf && frame[18] == aim.slot;
        if !mine && frame.get(19).is_some_and(|&command| command == 0) {
            frame[16..18].copy_from_slice(&aim.shelf.to_be_bytes());
            frame[18] = aim.slot;
        }
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [interface, destination, address, frames, seed] = arguments.as_slice() else {
        bail!("write torus-junk INTERFACE DESTINATION-MAC SHELF.SLOT FRAMES SEED");
    };
    let bytes =
        destination.split(':').map(|part| u8::from_str_radix(part, 16)).collect::<Result<Vec<_>, _>>();
    let destination = bytes.context("the second argument is a MAC address")?.try_into();
    let (shelf, slot) = address.split_once('.').context("the third argument is SHELF.SLOT")?;
    let (frames, mut random) = (frames.parse::<u64>()?, Random::new(seed.parse()?));

    let mut port = Port::open(interface)?;
    let aim = Aim {
        destination: destination.ok().context("a MAC address has six bytes")?,
        source: port.mac(),
        shelf: shelf.parse()?,
        slot: slot.parse()?,
    };
    let longest = usize::try_from(port.mtu())? + 14;

    let mut sent = 0;
    while sent < frames {
        let mut frame = template(&mut random, &aim);
        spoil(&mut random, &mut frame);
        confine(&mut frame, &aim);
        frame.truncate(longest);
        if random.below(16) == 0 && frame.len() > 14 {
            // In the VLAN 5, which nobody serves.
            frame.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        }
        port.queue(&frame)?;
        sent += 1;
        if sent % BURST == 0 || sent == frames {
            port.flush();
            // The answers are of no interest, but they need not fill the socket.
            port.receive(|_| {});
        }
    }
    println!("{sent} frames sent");
    Ok(())
}
