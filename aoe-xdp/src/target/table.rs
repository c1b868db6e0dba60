//! All exports, found in a few array reads: by address for requests, in order of address for discovery, by key for what
//! the data plane knows by key, by MAC for the rare request that names a station but not an address.

use std::collections::HashMap;

use super::Export;
use crate::wire::{Address, Mac};

/// All exports of a node.
#[derive(Debug)]
pub struct ExportTable {
    /// In order of address.
    exports: Vec<Export>,
    /// Shelf → page number + 1; 0 where the shelf has no export.
    page_of_shelf: Box<[u32]>,
    /// Slot → export number + 1.
    pages: Vec<[u32; 256]>,
    /// Export key → export number + 1.
    by_key: Vec<u32>,
    /// MAC without the interface's ordinal → export number.
    by_mac: HashMap<[u8; 6], u32>,
}

/// Two exports claim one address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("two exports have the address {0}")]
pub struct DuplicateAddress(pub Address);

impl Default for ExportTable {
    fn default() -> ExportTable {
        ExportTable::new(Vec::new()).expect("no export, no duplicate")
    }
}

impl ExportTable {
    /// Builds the table. Keys are positions in arrays: they are to be small numbers.
    ///
    /// # Errors
    /// [`DuplicateAddress`].
    pub fn new(mut exports: Vec<Export>) -> Result<ExportTable, DuplicateAddress> {
        exports.sort_by_key(|export| export.address);
        let mut page_of_shelf = vec![0u32; 1 << 16].into_boxed_slice();
        let mut pages: Vec<[u32; 256]> = Vec::new();
        let keys = exports.iter().map(|export| export.key as usize + 1).max().unwrap_or(0);
        let mut by_key = vec![0; keys];
        let mut by_mac = HashMap::with_capacity(exports.len());
        for (number, export) in (1u32..).zip(&exports) {
            let page = &mut page_of_shelf[usize::from(export.address.shelf)];
            if *page == 0 {
                pages.push([0; 256]);
                *page = u32::try_from(pages.len()).expect("at most 2^16 shelves");
            }
            let slot = &mut pages[*page as usize - 1][usize::from(export.address.slot)];
            if std::mem::replace(slot, number) != 0 {
                return Err(DuplicateAddress(export.address));
            }
            by_key[export.key as usize] = number;
            by_mac.insert(without_ordinal(export.mac), number - 1);
        }
        Ok(ExportTable { exports, page_of_shelf, pages, by_key, by_mac })
    }

    /// All exports, in order of address.
    #[must_use]
    pub fn exports(&self) -> &[Export] {
        &self.exports
    }

    /// Those with this address or a higher one, in order.
    #[must_use]
    pub fn starting_at(&self, address: Address) -> &[Export] {
        let first = self.exports.partition_point(|export| export.address < address);
        &self.exports[first..]
    }

    /// The export at exactly this address.
    #[must_use]
    pub fn find(&self, address: Address) -> Option<&Export> {
        let page = self.page_of_shelf[usize::from(address.shelf)].checked_sub(1)?;
        let number = self.pages[page as usize][usize::from(address.slot)].checked_sub(1)?;
        self.exports.get(number as usize)
    }

    /// The export with this key.
    #[must_use]
    pub fn by_key(&self, key: u32) -> Option<&Export> {
        let number = self.by_key.get(key as usize)?.checked_sub(1)?;
        self.exports.get(number as usize)
    }

    /// The export that has this MAC on some interface.
    #[must_use]
    pub fn by_mac(&self, mac: Mac) -> Option<&Export> {
        self.exports.get(*self.by_mac.get(&without_ordinal(mac))? as usize)
    }
}

fn without_ordinal(mac: Mac) -> [u8; 6] {
    let [a, b, c, d, e, last] = mac.0;
    [a, b, c, d, e, last & 0xf0]
}

#[cfg(test)]
mod tests {
    use super::super::testing::export;
    use super::*;

    #[test]
    fn every_export_is_found_and_duplicates_are_refused() {
        let exports: Vec<Export> = (0..20u16)
            .rev()
            .flat_map(|shelf| (0..50u8).map(move |slot| (shelf, slot)))
            .map(|(shelf, slot)| Export {
                key: u32::from(shelf) * 50 + u32::from(slot),
                mac: Mac([2, 0, 0, u8::try_from(shelf).unwrap(), slot, 0x40]),
                ..export(shelf * 3000, slot)
            })
            .collect();
        let table = ExportTable::new(exports.clone()).unwrap();
        for export in &exports {
            assert_eq!(table.find(export.address), Some(export));
            assert_eq!(table.by_key(export.key), Some(export));
            assert_eq!(table.by_mac(export.mac_on(7)), Some(export));
        }
        assert!(table.exports().is_sorted_by_key(|export| export.address));
        for missing in [Address { shelf: 1, slot: 0 }, Address { shelf: 0, slot: 50 }, Address::ANY] {
            assert_eq!(table.find(missing), None);
        }
        assert_eq!(table.by_key(1000), None);
        assert_eq!(table.by_mac(Mac::BROADCAST), None);
        let twice = vec![export(1, 2), export(1, 2)];
        assert_eq!(ExportTable::new(twice).unwrap_err(), DuplicateAddress(Address { shelf: 1, slot: 2 }));
    }

    #[test]
    fn the_rest_of_the_table_starts_at_any_address() {
        let table = ExportTable::new(vec![export(2, 9), export(1, 2), export(1, 7)]).unwrap();
        let from = |shelf, slot| {
            table
                .starting_at(Address { shelf, slot })
                .iter()
                .map(|e| e.address.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(from(0, 0), ["1.2", "1.7", "2.9"]);
        assert_eq!(from(1, 3), ["1.7", "2.9"]);
        assert_eq!(from(2, 9), ["2.9"]);
        assert!(from(2, 10).is_empty());
    }
}
