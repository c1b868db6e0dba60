//! What a volume must hold: stamps in every written sector, and the oracle of the versions that each may have.
//!
//! Every 512-byte sector written carries its own address, the version of its block, the seed of the run and a CRC32C
//! over all of it. For each sector the oracle keeps the lowest version that may still be read (the last acknowledged,
//! or a higher one that was read already: a value once read may not disappear again), and for each block the highest
//! version ever sent. Whatever lies between is allowed, since a write that was not acknowledged may or may not have
//! happened, sector by sector. One write per block is unfinished at a time, so the allowed versions are exact.
//!
//! The oracle can be written to a file and used later, after anything was killed, to read everything back.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use aoe_xdp::wire::SECTOR_LEN;

use crate::workload::{Random, Region};

const MAGIC: [u8; 8] = *b"TORUSBN1";
/// Bytes of a stamp before the filler: magic, seed, LBA, version, CRC32C.
const STAMP_LEN: usize = 32;
const CRC_AT: usize = 28;
/// The log's format.
const LOG_FORMAT: u32 = 1;
/// Violations that are described one by one; the rest is only counted.
const EXAMPLES_MAX: usize = 16;
/// The most memory that an oracle may take: 4 bytes a sector.
const ORACLE_BYTES_MAX: u64 = 2 << 30;

/// Bytes of one sector.
pub(crate) type Sector = [u8; SECTOR_LEN];

/// Fills a sector as the run of `seed` writes it.
pub(crate) fn stamp(sector: &mut Sector, seed: u64, lba: u64, version: u32) {
    sector[..8].copy_from_slice(&MAGIC);
    sector[8..16].copy_from_slice(&seed.to_le_bytes());
    sector[16..24].copy_from_slice(&lba.to_le_bytes());
    sector[24..CRC_AT].copy_from_slice(&version.to_le_bytes());
    let mut filler = Random::new(seed ^ lba.rotate_left(32) ^ u64::from(version));
    for word in sector[STAMP_LEN..].chunks_exact_mut(8) {
        word.copy_from_slice(&filler.next().to_le_bytes());
    }
    let crc = sector_crc(sector);
    sector[CRC_AT..STAMP_LEN].copy_from_slice(&crc.to_le_bytes());
}

fn sector_crc(sector: &Sector) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&sector[..CRC_AT]), &sector[STAMP_LEN..])
}

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Zeros,
    /// No stamp at all.
    Foreign,
    /// A stamp whose checksum is wrong.
    Torn,
    Stamp {
        seed: u64,
        lba: u64,
        version: u32,
    },
}

fn content(sector: &Sector) -> Content {
    let number = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("8 bytes"));
    if sector[..8] != MAGIC {
        return if sector.iter().all(|&byte| byte == 0) { Content::Zeros } else { Content::Foreign };
    }
    let word = |at: usize| u32::from_le_bytes(sector[at..at + 4].try_into().expect("4 bytes"));
    if word(CRC_AT) != sector_crc(sector) {
        return Content::Torn;
    }
    Content::Stamp { seed: number(8), lba: number(16), version: word(24) }
}

/// Why a sector is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fault {
    /// Older than what was acknowledged (or read before): zeros, an older version, another run's data.
    Lost,
    /// Neither old nor new.
    Torn,
    /// Another sector's data, or a version that was never written.
    Wrong,
}

/// A wrong sector.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Violation {
    pub(crate) lba: u64,
    pub(crate) fault: Fault,
    pub(crate) found: String,
    /// Lowest and highest version that were allowed.
    pub(crate) allowed: (u32, u32),
}

/// What checking found.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Findings {
    /// Sectors that were compared with the versions allowed.
    pub(crate) checked_sectors: u64,
    /// Sectors read that nothing is known of, since this run had not written them.
    pub(crate) unknown_sectors: u64,
    pub(crate) lost_sectors: u64,
    pub(crate) torn_sectors: u64,
    pub(crate) wrong_sectors: u64,
    /// The first violations.
    pub(crate) examples: Vec<Violation>,
}

impl Findings {
    /// Whether any sector was wrong.
    pub(crate) fn is_bad(&self) -> bool {
        self.lost_sectors + self.torn_sectors + self.wrong_sectors > 0
    }

    fn add(&mut self, violation: Violation) {
        match violation.fault {
            Fault::Lost => self.lost_sectors += 1,
            Fault::Torn => self.torn_sectors += 1,
            Fault::Wrong => self.wrong_sectors += 1,
        }
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(violation);
        }
    }
}

/// The first line of a log; the tables and a CRC32C follow as little-endian words.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct LogHead {
    format: u32,
    target: String,
    seed: u64,
    region: Region,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Oracle {
    seed: u64,
    region: Region,
    /// Per sector: the lowest version that may be read; 0 is whatever was there before.
    lowest: Vec<u32>,
    /// Per block: the highest version that was ever sent.
    highest: Vec<u32>,
    /// Per block: whether a write is unfinished.
    writing: Vec<bool>,
}

impl Oracle {
    /// Nothing was written yet.
    pub(crate) fn new(seed: u64, region: Region) -> anyhow::Result<Oracle> {
        ensure!(
            region.sectors().saturating_mul(4) <= ORACLE_BYTES_MAX,
            "a region of {} sectors is too large to be verified: give a smaller one with --size",
            region.sectors()
        );
        let sectors = usize::try_from(region.sectors()).context("region too large for this machine")?;
        let blocks = usize::try_from(region.blocks).context("region too large for this machine")?;
        Ok(Oracle {
            seed,
            region,
            lowest: vec![0; sectors],
            highest: vec![0; blocks],
            writing: vec![false; blocks],
        })
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn region(&self) -> Region {
        self.region
    }

    /// The version for a new write of a block, or `None` while one is unfinished.
    pub(crate) fn begin_write(&mut self, block: u64) -> Option<u32> {
        let block = index(block);
        if self.writing[block] || self.highest[block] == u32::MAX {
            return None;
        }
        self.writing[block] = true;
        self.highest[block] += 1;
        Some(self.highest[block])
    }

    /// These sectors were acknowledged with that version.
    pub(crate) fn acknowledged(&mut self, lba: u64, sectors: u8, version: u32) {
        for lowest in &mut self.lowest[span(&self.region, lba, sectors)] {
            *lowest = (*lowest).max(version);
        }
    }

    /// The block's write ended, acknowledged or not.
    pub(crate) fn end_write(&mut self, block: u64) {
        self.writing[index(block)] = false;
    }

    /// Whether anything is known of a block.
    pub(crate) fn knows(&self, block: u64) -> bool {
        self.highest[index(block)] > 0
    }

    /// Copies out what is allowed at least when a read of these sectors begins.
    pub(crate) fn snapshot(&self, lba: u64, sectors: u8, into: &mut [u32]) {
        into[..usize::from(sectors)].copy_from_slice(&self.lowest[span(&self.region, lba, sectors)]);
    }

    /// Judges a sector that was read, with the lowest version allowed when the read began.
    pub(crate) fn check(&mut self, lba: u64, sector: &Sector, lowest: u32, findings: &mut Findings) {
        let highest = self.highest[index(self.region.block(lba))];
        if highest == 0 {
            findings.unknown_sectors += 1;
            return;
        }
        findings.checked_sectors += 1;
        let found = content(sector);
        let fault = match found {
            Content::Torn => Some(Fault::Torn),
            Content::Stamp { seed, lba: at, version } if seed == self.seed => {
                if at != lba || version > highest || version == 0 {
                    Some(Fault::Wrong)
                } else if version < lowest {
                    Some(Fault::Lost)
                } else {
                    let known = &mut self.lowest[index(lba - self.region.start_lba)];
                    *known = (*known).max(version);
                    None
                }
            }
            Content::Zeros | Content::Foreign | Content::Stamp { .. } => (lowest > 0).then_some(Fault::Lost),
        };
        if let Some(fault) = fault {
            let found = format!("{found:?}");
            findings.add(Violation { lba, fault, found, allowed: (lowest, highest) });
        }
    }

    /// Writes the log, whole or not at all.
    pub(crate) fn save(&self, path: &Path, target: &str) -> anyhow::Result<()> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        let write = || -> anyhow::Result<()> {
            let file = File::create(&temporary)?;
            let mut out = BufWriter::with_capacity(1 << 20, file);
            let head = LogHead {
                format: LOG_FORMAT,
                target: target.to_owned(),
                seed: self.seed,
                region: self.region,
            };
            let mut line = serde_json::to_vec(&head)?;
            line.push(b'\n');
            out.write_all(&line)?;
            let mut crc = crc32c::crc32c(&line);
            for version in self.highest.iter().chain(&self.lowest) {
                let bytes = version.to_le_bytes();
                crc = crc32c::crc32c_append(crc, &bytes);
                out.write_all(&bytes)?;
            }
            out.write_all(&crc.to_le_bytes())?;
            out.into_inner().map_err(|error| error.into_error())?.sync_all()?;
            std::fs::rename(&temporary, path)?;
            Ok(())
        };
        write().with_context(|| format!("cannot write the verify log {}", path.display()))
    }

    /// Reads a log back, with the target that it was made for.
    pub(crate) fn load(path: &Path) -> anyhow::Result<(Oracle, String)> {
        let read = || -> anyhow::Result<(Oracle, String)> {
            let mut bytes = Vec::new();
            BufReader::new(File::open(path)?).read_to_end(&mut bytes)?;
            Oracle::parse(&bytes)
        };
        read().with_context(|| format!("cannot use the verify log {}", path.display()))
    }

    fn parse(bytes: &[u8]) -> anyhow::Result<(Oracle, String)> {
        let Some((body, crc)) = bytes.split_last_chunk::<4>() else { bail!("it is too short") };
        ensure!(crc32c::crc32c(body) == u32::from_le_bytes(*crc), "its checksum is wrong");
        let line_len = body.iter().position(|&byte| byte == b'\n').context("it has no head line")?;
        let (line, tables) = body.split_at(line_len);
        let head: LogHead = serde_json::from_slice(line).context("its head line cannot be read")?;
        ensure!(head.format == LOG_FORMAT, "its format is {}, this program reads {LOG_FORMAT}", head.format);
        let region = head.region;
        let words = region
            .blocks
            .checked_mul(u64::from(region.block_sectors))
            .filter(|&sectors| sectors > 0 && region.start_lba.checked_add(sectors).is_some())
            .and_then(|sectors| sectors.checked_add(region.blocks))
            .context("its region is impossible")?;
        ensure!(
            u64::try_from(tables.len() - 1)? == words.checked_mul(4).context("its region is impossible")?,
            "its tables do not fit its region"
        );
        let mut oracle = Oracle::new(head.seed, region)?;
        let mut versions =
            tables[1..].chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")));
        for slot in oracle.highest.iter_mut().chain(&mut oracle.lowest) {
            *slot = versions.next().context("its tables end early")?;
        }
        Ok((oracle, head.target))
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("the tables fit the memory")
}

fn span(region: &Region, lba: u64, sectors: u8) -> std::ops::Range<usize> {
    let start = index(lba - region.start_lba);
    start..start + usize::from(sectors)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEED: u64 = 99;

    fn region() -> Region {
        Region { start_lba: 64, block_sectors: 8, blocks: 4 }
    }

    fn sector(seed: u64, lba: u64, version: u32) -> Sector {
        let mut sector = [0; SECTOR_LEN];
        stamp(&mut sector, seed, lba, version);
        sector
    }

    /// An oracle whose block 1 (LBA 72..80) had versions 1 and 2 acknowledged and 3 sent.
    fn written() -> Oracle {
        let mut oracle = Oracle::new(SEED, region()).unwrap();
        for version in 1..=2 {
            assert_eq!(oracle.begin_write(1), Some(version));
            assert_eq!(oracle.begin_write(1), None, "one write of a block at a time");
            oracle.acknowledged(72, 8, version);
            oracle.end_write(1);
        }
        assert_eq!(oracle.begin_write(1), Some(3));
        oracle
    }

    fn judge(oracle: &mut Oracle, lba: u64, sector: &Sector) -> Option<Fault> {
        let mut lowest = [0; 1];
        oracle.snapshot(lba, 1, &mut lowest);
        let mut findings = Findings::default();
        oracle.check(lba, sector, lowest[0], &mut findings);
        assert_eq!(findings.is_bad(), !findings.examples.is_empty());
        findings.examples.first().map(|violation| violation.fault)
    }

    #[test]
    fn acknowledged_and_unfinished_versions_are_allowed() {
        let mut oracle = written();
        assert_eq!(judge(&mut oracle, 72, &sector(SEED, 72, 2)), None);
        assert_eq!(judge(&mut oracle, 73, &sector(SEED, 73, 3)), None);
    }

    #[test]
    fn planted_faults_are_found() {
        let mut oracle = written();
        let mut torn = sector(SEED, 72, 3);
        torn[256..].copy_from_slice(&sector(SEED, 72, 2)[256..]);
        for (found, fault) in [
            (sector(SEED, 72, 1), Fault::Lost),
            ([0; SECTOR_LEN], Fault::Lost),
            ([0x5a; SECTOR_LEN], Fault::Lost),
            (sector(SEED + 1, 72, 2), Fault::Lost),
            (sector(SEED, 73, 2), Fault::Wrong),
            (sector(SEED, 72, 4), Fault::Wrong),
            (torn, Fault::Torn),
        ] {
            assert_eq!(judge(&mut oracle, 72, &found), Some(fault), "{:?}", content(&found));
        }
    }

    #[test]
    fn a_value_once_read_may_not_disappear() {
        let mut oracle = written();
        assert_eq!(judge(&mut oracle, 72, &sector(SEED, 72, 3)), None);
        assert_eq!(judge(&mut oracle, 72, &sector(SEED, 72, 2)), Some(Fault::Lost));
        assert_eq!(
            judge(&mut oracle, 73, &sector(SEED, 73, 2)),
            None,
            "the other sectors are not bound by it"
        );
    }

    #[test]
    fn a_read_that_began_earlier_may_see_what_was_allowed_then() {
        let mut oracle = written();
        let mut lowest = [0; 8];
        oracle.snapshot(72, 8, &mut lowest);
        oracle.acknowledged(72, 8, 3);
        oracle.end_write(1);
        let mut findings = Findings::default();
        oracle.check(72, &sector(SEED, 72, 2), lowest[0], &mut findings);
        assert!(!findings.is_bad());
        assert_eq!(judge(&mut oracle, 73, &sector(SEED, 73, 2)), Some(Fault::Lost));
    }

    #[test]
    fn unwritten_blocks_are_not_judged_and_half_known_ones_are() {
        let mut oracle = written();
        assert_eq!(judge(&mut oracle, 64, &[0x77; SECTOR_LEN]), None);
        assert_eq!(oracle.begin_write(0), Some(1));
        assert_eq!(judge(&mut oracle, 64, &[0x77; SECTOR_LEN]), None, "the first write is not acknowledged");
        assert_eq!(judge(&mut oracle, 64, &sector(SEED, 64, 2)), Some(Fault::Wrong));
    }

    #[test]
    fn a_log_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut oracle = written();
        oracle.save(&path, "1.2").unwrap();
        oracle.end_write(1);
        assert_eq!(Oracle::load(&path).unwrap(), (oracle, "1.2".to_owned()));
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", Oracle::load(&path).unwrap_err());
        assert!(error.contains("checksum"), "{error}");
    }

    proptest! {
        #[test]
        fn every_changed_bit_of_a_stamped_sector_is_found(bit in 0usize..SECTOR_LEN * 8) {
            let mut oracle = written();
            let mut found = sector(SEED, 72, 2);
            found[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(judge(&mut oracle, 72, &found).is_some());
        }

        #[test]
        fn parsing_a_log_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..400) {
            prop_assert!(Oracle::parse(&bytes).is_err());
            let region_json = r#"{"format":1,"target":"1.1","seed":1,"region":{"start_lba":18446744073709551615,"block_sectors":4294967295,"blocks":18446744073709551615}}"#;
            let mut log = region_json.as_bytes()[..cut.min(region_json.len())].to_vec();
            log.push(b'\n');
            let crc = crc32c::crc32c(&log);
            log.extend_from_slice(&crc.to_le_bytes());
            prop_assert!(Oracle::parse(&log).is_err());
        }
    }
}
