//! The cases that are about frames alone, by their number in docs/conformance.md.

mod ata;
mod config;
mod header;
mod masks;
mod reserve;

pub use ata::*;
pub use config::*;
pub use header::*;
pub use masks::*;
pub use reserve::*;

/// Calls a macro with the names of all cases.
#[macro_export]
macro_rules! for_each_case {
    ($call:ident) => {
        $call! {
            case_01_a_frame_of_23_bytes
            case_02_another_ethertype
            case_03_a_response
            case_04_from_the_interface_itself
            case_05_version_two
            case_06_another_slot
            case_07_any_shelf
            case_08_any_slot
            case_09_discovery
            case_10_an_unknown_command
            case_11_a_vendor_command
            case_12_a_tag_with_its_highest_bit
            case_13_the_answer_comes_from_the_exports_mac_and_is_padded
            case_14_a_reserved_flag
            case_15_to_another_station
            case_16_twice_with_two_tags
            case_18_a_short_config_read
            case_19_a_config_read_with_filler
            case_20_a_test_that_matches
            case_21_a_test_that_differs
            case_22_a_prefix_that_matches
            case_23_a_prefix_that_is_too_long
            case_24_set_an_empty_string
            case_25_set_over_another_string
            case_26_set_the_same_string
            case_27_force_set_of_the_longest_string_survives_a_crash
            case_28_force_set_of_nothing
            case_29_a_string_that_is_too_long
            case_30_a_string_longer_than_its_frame
            case_31_an_unknown_sub_command
            case_33_identify
            case_34_identify_with_any_count_and_payload
            case_35_identify_by_everyone
            case_36_identify_of_a_large_volume
            case_37_reads_of_every_count
            case_38_one_sector_too_many
            case_39_the_end_of_the_volume
            case_40_far_beyond_the_end
            case_41_reads_beyond_two_tebibytes
            case_42_a_28_bit_read_with_device_bits
            case_43_a_write_survives_a_crash
            case_44_a_write_with_too_little_data
            case_45_a_write_with_surplus_data
            case_46_the_command_decides_the_direction
            case_47_the_probe_of_linux
            case_48_a_write_to_a_read_only_export
            case_49_a_write_with_the_async_flag
            case_50_a_count_of_zero
            case_51_flush
            case_52_check_power_mode
            case_53_commands_that_no_disk_of_ours_has
            case_54_a_write_to_everyone
            case_56_single_sectors_beside_each_other
            case_62_an_empty_mask_list
            case_63_masks_added_and_deleted
            case_64_a_mask_added_twice
            case_65_a_bad_directive_changes_nothing
            case_66_more_masks_than_fit
            case_67_an_unknown_mask_command
            case_68_more_directives_than_the_frame_has
            case_69_who_is_masked_out_gets_silence
            case_70_a_reservation_read
            case_71_a_reservation_keeps_others_out
            case_72_a_reservation_of_somebody_else
            case_73_what_is_served_beside_a_reservation
            case_74_a_reservation_by_force
            case_75_a_release
            case_76_more_macs_than_the_frame_has
            case_77_an_unknown_reserve_command
        }
    };
}
