//! `torus-sectors INTERFACE SHELF.SLOT read LBA COUNT > FILE`, `torus-sectors INTERFACE SHELF.SLOT write LBA
//! [PER_REQUEST] < FILE`: a few sectors of an export, without any driver: what a test puts on a disk for somebody else to find, and finds there.
//!
//! One request at a time, sent again until it is answered.
#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _, stdin, stdout};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use torus_e2e::port::Port;

const SECTOR: usize = 512;
/// Sectors of a request: what every target takes at every MTU.
const SECTORS_MAX: usize = 2;
const AGAIN: Duration = Duration::from_millis(200);
const GIVE_UP: Duration = Duration::from_secs(20);
const READ_EXT: u8 = 0x24;
const WRITE_EXT: u8 = 0x34;

struct Disk {
    port: Port,
    target: [u8; 6],
    shelf: [u8; 2],
    slot: u8,
    tag: u32,
}

impl Disk {
    /// Sends a request until its answer comes; what follows the answer's tag.
    fn ask(&mut self, command: u8, arguments: &[u8], data: &[u8]) -> Result<Vec<u8>> {
        self.tag += 1;
        let mut frame = Vec::with_capacity(36 + data.len());
        frame.extend_from_slice(&self.target);
        frame.extend_from_slice(&self.port.mac());
        frame.extend_from_slice(&[0x88, 0xa2, 0x10, 0]);
        frame.extend_from_slice(&self.shelf);
        frame.extend_from_slice(&[self.slot, command]);
        frame.extend_from_slice(&self.tag.to_be_bytes());
        frame.extend_from_slice(arguments);
        frame.extend_from_slice(data);
        frame.resize(frame.len().max(60), 0);
        let begun = Instant::now();
        let mut answer: Option<Vec<u8>> = None;
        while begun.elapsed() < GIVE_UP {
            self.port.send(&frame)?;
            let sent = Instant::now();
            while sent.elapsed() < AGAIN {
                let (tag, mac) = (self.tag.to_be_bytes(), self.port.mac());
                self.port.receive(|got| {
                    let mine =
                        got.len() >= 36 && got[..6] == mac && got[14] & 0x08 != 0 && got[20..24] == tag;
                    if mine && got[19] == command {
                        answer = Some(got.to_vec());
                    }
                });
                if let Some(answer) = answer {
                    ensure!(answer[14] & 0x04 == 0, "the target answers with AoE error {}", answer[15]);
                    self.target.copy_from_slice(&answer[6..12]);
                    return Ok(answer[24..].to_vec());
                }
                sleep(Duration::from_micros(200));
            }
        }
        bail!("no answer within {} s", GIVE_UP.as_secs())
    }

    fn ata(&mut self, command: u8, flags: u8, lba: u64, sectors: usize, data: &[u8]) -> Result<Vec<u8>> {
        let mut arguments = [0; 12];
        arguments[..4].copy_from_slice(&[flags, 0, u8::try_from(sectors)?, command]);
        arguments[4..10].copy_from_slice(&lba.to_le_bytes()[..6]);
        let answer = self.ask(0, &arguments, data)?;
        ensure!(answer[3] & 0xa9 == 0, "sector {lba}: status {:#x}, error {:#x}", answer[3], answer[1]);
        Ok(answer)
    }
}

fn main() -> Result<()> {
    const USAGE: &str =
        "write torus-sectors INTERFACE SHELF.SLOT read LBA COUNT, or … write LBA [PER_REQUEST]";
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    ensure!(arguments.len() >= 4, USAGE);
    let (shelf, slot) = arguments[1].split_once('.').context("the second argument is SHELF.SLOT")?;
    let mut lba: u64 = arguments[3].parse().context("LBA is a number")?;
    let mut disk = Disk {
        port: Port::open(&arguments[0])?,
        target: [0xff; 6],
        shelf: shelf.parse::<u16>()?.to_be_bytes(),
        slot: slot.parse()?,
        tag: std::process::id() & 0xffff,
    };
    // Query Config, broadcast: its answer comes from the export's address.
    disk.ask(1, &[0; 8], &[])?;
    match (arguments[2].as_str(), arguments.get(4)) {
        ("read", Some(count)) => {
            let mut left: usize = count.parse().context("COUNT is a number of sectors")?;
            while left > 0 {
                let sectors = left.min(SECTORS_MAX);
                let answer = disk.ata(READ_EXT, 0x40, lba, sectors, &[])?;
                let data = answer.get(12..12 + sectors * SECTOR).context("the answer is short")?;
                stdout().write_all(data)?;
                lba += u64::try_from(sectors)?;
                left -= sectors;
            }
        }
        ("write", at_a_time) => {
            let at_a_time = at_a_time.map_or(Ok(SECTORS_MAX), |text| text.parse());
            let at_a_time: usize = at_a_time.context("PER_REQUEST is a number of sectors")?;
            ensure!((1..=16).contains(&at_a_time), "PER_REQUEST is between 1 and 16");
            let mut data = Vec::new();
            stdin().read_to_end(&mut data)?;
            data.resize(data.len().next_multiple_of(SECTOR), 0);
            for part in data.chunks(at_a_time * SECTOR) {
                let sectors = part.len() / SECTOR;
                disk.ata(WRITE_EXT, 0x41, lba, sectors, part)?;
                lba += u64::try_from(sectors)?;
            }
        }
        _ => bail!(USAGE),
    }
    Ok(())
}
