//! Tests that three lanes, however far apart they are and however their bytes are cut, come to what one [`Measurer`] does.

use super::*;

/// Feeds each lane the whole file in pieces of its own, one lane after another; each stops at its first error.
fn measure_in_lanes(file: &[u8], cuts: [usize; 3]) -> Result<EifReport, EifError> {
    let Lanes { file: mut whole, mut image, mut application } = Lanes::new(Limits::default());
    // The chains go first: what they find must not come before what the file's lane finds.
    drop(file.chunks(cuts[0]).try_for_each(|piece| application.update(piece)));
    drop(file.chunks(cuts[1]).try_for_each(|piece| image.update(piece)));
    drop(file.chunks(cuts[2]).try_for_each(|piece| whole.update(piece)));
    Lanes { file: whole, image, application }.join()
}

fn cuts() -> impl Strategy<Value = [usize; 3]> {
    [1_usize..700, 1_usize..700, 1_usize..4000]
}

/// A file with damage of every kind: bytes changed, cut off, appended; with a right CRC or without.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<prop::sample::Index>(), any::<u8>());
    let signed = signature::signed_image();
    let base = prop_oneof![4 => images().prop_map(|image| image.bytes()), 1 => Just(signed)];
    (base, prop::collection::vec(change, 0..4), any::<prop::sample::Index>(), 0_u8..4, any::<bool>(), any::<bool>())
        .prop_map(|(mut file, changes, cut, size, sealed, in_header)| {
            for (at, byte) in changes {
                let range = if in_header { 548 } else { file.len() };
                file[at.index(range)] = byte;
            }
            match size {
                0 => file.truncate(cut.index(file.len()) + 1),
                1 => file.push(0),
                _ => {}
            }
            if sealed && file.len() >= 548 {
                seal(&mut file);
            }
            file
        })
}

proptest! {
    #[test]
    fn lanes_come_to_what_one_thread_does_whatever_the_damage_and_the_chunking(file in damaged(), cuts in cuts()) {
        prop_assert_eq!(measure_in_lanes(&file, cuts), measure(&file));
    }

    #[test]
    fn a_lane_that_saw_other_bytes_than_the_others_is_found_out(
        image in images(),
        which in 0_usize..3,
        at in any::<prop::sample::Index>(),
        flip in 1_u8..,
    ) {
        let good = image.bytes();
        let mut other = good.clone();
        let at = at.index(good.len());
        other[at] ^= flip;
        let bytes = |lane: usize| if lane == which { &other } else { &good };
        let mut lanes = Lanes::new(Limits::default());
        drop(lanes.file.update(bytes(0)));
        drop(lanes.image.update(bytes(1)));
        drop(lanes.application.update(bytes(2)));
        let joined = lanes.join();
        // The header's CRC is taken from the file's lane alone; that of the others is never looked at.
        prop_assert!(joined.is_err() || ((544..548).contains(&at) && which != 0), "byte {} of lane {}", at, which);
    }
}

#[test]
fn a_lane_that_was_not_fed_to_the_end_makes_the_file_truncated() {
    let file = typical().bytes();
    let feed = |sizes: [usize; 3]| {
        let mut lanes = Lanes::new(Limits::default());
        lanes.file.update(&file[..sizes[0]]).unwrap();
        lanes.image.update(&file[..sizes[1]]).unwrap();
        lanes.application.update(&file[..sizes[2]]).unwrap();
        lanes.join()
    };
    let all = file.len();
    assert!(feed([all; 3]).is_ok());
    for sizes in [[all - 1, all, all], [all, all - 1, all], [all, all, 600]] {
        assert!(matches!(feed(sizes), Err(EifError::Truncated { .. })), "{sizes:?}");
    }
}

#[test]
fn the_error_at_the_earliest_place_is_reported_whichever_lane_fails_first() {
    // Metadata that can't be read, which the file's lane alone notices, before a section of an unknown type.
    let sections = [(KERNEL, &b"k"[..]), (CMDLINE, b"c"), (METADATA, b"["), (RAMDISK, b"r"), (9, b"?")];
    let file = image(&sections).bytes();
    let error = measure_in_lanes(&file, [700, 700, 1]).unwrap_err();
    assert!(matches!(error, EifError::Metadata { .. }), "{error}");
    assert_eq!(measure(&file), Err(error));
}

#[test]
fn each_lane_knows_its_position_and_the_files_size() {
    let file = typical().bytes();
    let mut lanes = Lanes::new(Limits::default());
    lanes.image.update(&file[..600]).unwrap();
    assert_eq!((lanes.image.position(), lanes.image.expected_size()), (600, Some(file.len() as u64)));
    assert_eq!((lanes.application.position(), lanes.application.expected_size()), (0, None));
}
