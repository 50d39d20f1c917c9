//! Tests of the verdict: which images are the ones that were asked for, and what is said of the others.

use super::*;

/// All that an image can be pinned by.
fn pins_of(report: &EifReport) -> Pins {
    let Measurements { pcr0, pcr1, pcr2, pcr8 } = *report.measurements();
    Pins { sha256: Some(report.digest()), pcr0: Some(pcr0), pcr1: Some(pcr1), pcr2: Some(pcr2), pcr8 }
}

fn pcr0(byte: u8) -> Pins {
    Pins { pcr0: Some(Pcr([byte; 48])), ..Pins::default() }
}

#[test]
fn an_image_that_is_what_was_asked_for_is_verified_and_keeps_its_report() {
    let report = measure(&typical().bytes()).unwrap();
    let measurements = *report.measurements();
    let image = verify(report.clone(), &pins_of(&report).into()).unwrap();
    assert_eq!((image.digest(), *image.measurements(), image.size()), (report.digest(), measurements, report.size()));
    assert_eq!((image.name(), image.version()), (Some("signer"), Some("1.2")));
    assert!(verify(report, &ExpectedImage::default()).is_ok());
}

#[test]
fn a_refusal_lists_every_difference_with_both_values_and_a_remedy() {
    let report = measure(&typical().bytes()).unwrap();
    let wrong = Pcr([0xab; 48]);
    let expected = Pins {
        sha256: Some(EifDigest([0xcd; 32])),
        pcr0: Some(wrong),
        pcr1: Some(report.measurements().pcr1),
        pcr2: Some(wrong),
        pcr8: Some(wrong),
    };
    let refusal = verify(report.clone(), &expected.into()).unwrap_err();
    assert_eq!(refusal.sets.len(), 1);
    let what: Vec<_> = refusal.sets[0].iter().map(|mismatch| mismatch.what).collect();
    assert_eq!(what, [Pinned::Sha256, Pinned::Pcr0, Pinned::Pcr2, Pinned::Pcr8]);
    let text = refusal.to_string();
    assert!(text.contains(&format!("PCR0 is {}, expected {wrong}", report.measurements().pcr0)), "{text}");
    assert!(text.contains("PCR8 is absent (the image is not signed)") && text.contains("sign the image"), "{text}");
}

#[test]
fn registers_of_zero_are_told_to_come_from_debug_mode() {
    let report = measure(&typical().bytes()).unwrap();
    let refusal = verify(report, &Pins { pcr0: Some(Pcr([0; 48])), ..Pins::default() }.into()).unwrap_err();
    assert!(refusal.to_string().contains("debug mode"), "{refusal}");
}

#[test]
fn what_is_expected_is_written_in_hexadecimal_and_misspelt_registers_are_refused() {
    let text = format!(r#"{{"pcr0":"{EMPTY_REGISTER}"}}"#);
    let expected: ExpectedImage = serde_json::from_str(&text).unwrap();
    assert_eq!(expected.any_of().next().unwrap().pcr0.unwrap().to_string(), EMPTY_REGISTER);
    assert_eq!(serde_json::to_string(&expected).unwrap(), text);
    assert!(serde_json::from_str::<ExpectedImage>(r#"{"pcr3":""}"#).is_err());
    assert!(ExpectedImage::default().is_empty() && !expected.is_empty());
}

#[test]
fn the_image_hash_of_dstack_is_that_of_the_three_registers_as_text_and_a_newline() {
    let measurements = Measurements { pcr0: Pcr([0; 48]), pcr1: Pcr([1; 48]), pcr2: Pcr([0xff; 48]), pcr8: None };
    let hash = EifDigest(os_image_hash(&measurements));
    // sha256sum <<< "$(printf 00%.0s {1..48})$(printf 01%.0s {1..48})$(printf ff%.0s {1..48})"
    assert_eq!(hash.to_string(), "75cc3b9749b89b43cfb1dfdd89d95113b777c26e3b2e1b50ce9df302b893181d");
}

#[test]
fn an_enclave_needs_four_times_its_image_and_64_mib_at_least() {
    for (size, mib) in [(0, 64), (16 << 20, 64), ((16 << 20) + 1, 65), (100 << 20, 400), (u64::MAX, 1 << 46)] {
        assert_eq!(required_memory(size).0, mib, "{size} bytes");
    }
}

#[test]
fn one_allowed_set_that_fits_as_a_whole_is_enough() {
    let report = measure(&typical().bytes()).unwrap();
    let right = pins_of(&report);
    assert!(verify(report.clone(), &ExpectedImage::new([pcr0(1), right.clone(), pcr0(2)], false)).is_ok());
    // A half of each of two sets is not one.
    let halves = [Pins { pcr1: Some(Pcr([1; 48])), ..right.clone() }, Pins { pcr2: Some(Pcr([2; 48])), ..right }];
    let refusal = verify(report, &ExpectedImage::new(halves, false)).unwrap_err();
    let what: Vec<Vec<_>> = refusal.sets.iter().map(|set| set.iter().map(|mismatch| mismatch.what).collect()).collect();
    assert!(what.contains(&vec![Pinned::Pcr1]) && what.contains(&vec![Pinned::Pcr2]) && what.len() == 2, "{what:?}");
}

#[test]
fn a_refusal_by_several_sets_shows_the_images_values_in_full_and_what_each_set_wants() {
    let report = measure(&typical().bytes()).unwrap();
    let other = Pins { pcr0: Some(report.measurements().pcr0), pcr2: Some(Pcr([0xcd; 48])), ..Pins::default() };
    let refusal = verify(report.clone(), &ExpectedImage::new([pcr0(0xab), other], false)).unwrap_err();
    let Measurements { pcr0, pcr2, .. } = report.measurements();
    let expected = format!(
        "PCR0 is {pcr0}, PCR2 is {pcr2}; none of the 2 allowed sets fits, which differ in: \
         PCR2 cdcdcdcdcdcd…, or PCR0 abababababab…"
    );
    assert_eq!(refusal.reason(), expected);
    assert!(refusal.to_string().contains("enclavectl measure"), "{refusal}");
}

#[test]
fn a_refusal_by_as_many_sets_as_can_be_configured_fits_the_longest_message() {
    let report = measure(&typical().bytes()).unwrap();
    let sets = (0..8).map(|n| {
        let pcr = Some(Pcr([n; 48]));
        Pins { sha256: Some(EifDigest([n; 32])), pcr0: pcr, pcr1: pcr, pcr2: pcr, pcr8: pcr }
    });
    let refusal = verify(report, &ExpectedImage::new(sets, true)).unwrap_err();
    assert!(refusal.to_string().len() < crate::failure::MAX_MESSAGE, "{}", refusal.to_string().len());
}

#[test]
fn a_required_signature_that_is_missing_is_refused_even_if_all_else_fits() {
    let report = measure(&typical().bytes()).unwrap();
    for sets in [vec![], vec![pins_of(&report), pcr0(1)]] {
        let refusal = verify(report.clone(), &ExpectedImage::new(sets, true)).unwrap_err();
        assert_eq!((refusal.sets.len(), refusal.not_signed), (0, true));
        let text = refusal.to_string();
        assert!(text.contains("it is not signed") && text.contains("remove require_signature"), "{text}");
    }
    let both = verify(report, &ExpectedImage::new([pcr0(1)], true)).unwrap_err().to_string();
    assert!(both.contains("PCR0 is ") && both.contains("it is not signed"), "{both}");
}

#[test]
fn a_required_signature_that_is_there_will_do_whoever_signed() {
    let report = measure(&signature::signed_image()).unwrap();
    assert!(verify(report, &ExpectedImage::new([], true)).is_ok());
}

#[test]
fn an_image_is_admitted_by_its_values_exactly_if_it_is_verified() {
    for report in [measure(&typical().bytes()).unwrap(), measure(&signature::signed_image()).unwrap()] {
        for sets in [vec![], vec![pins_of(&report)], vec![pcr0(1)], vec![pcr0(1), pins_of(&report)]] {
            for signed in [false, true] {
                let expected = ExpectedImage::new(sets.clone(), signed);
                let admitted = expected.admits(&report.digest(), report.measurements());
                assert_eq!(admitted, verify(report.clone(), &expected).is_ok(), "{expected:?}");
            }
        }
    }
}

/// Literally what is on the disks of hosts that ran before there could be several sets.
#[test]
fn what_was_written_when_there_was_one_set_is_read_and_written_as_it_was() {
    let (digest, pcr) = ("ab".repeat(32), "cd".repeat(48));
    let all = format!(r#"{{"sha256":"{digest}","pcr0":"{pcr}","pcr1":"{pcr}","pcr2":"{pcr}","pcr8":"{pcr}"}}"#);
    let pcr = Some(Pcr([0xcd; 48]));
    let pins = Pins { sha256: Some(EifDigest([0xab; 32])), pcr0: pcr, pcr1: pcr, pcr2: pcr, pcr8: pcr };
    for (text, expected) in [(all.as_str(), ExpectedImage::from(pins)), ("{}", ExpectedImage::default())] {
        assert_eq!(serde_json::from_str::<ExpectedImage>(text).unwrap(), expected);
        assert_eq!(serde_json::to_string(&expected).unwrap(), text);
    }
    let request = format!(r#"{{"source":"s3://bucket/signer.eif","expected":{{"pcr0":"{}"}}}}"#, "cd".repeat(48));
    let read: crate::desired::ImageRequest = serde_json::from_str(&request).unwrap();
    assert_eq!(read.expected, pcr0(0xcd).into());
    assert_eq!(serde_json::to_string(&read).unwrap(), request);
}

#[test]
fn several_sets_and_a_required_signature_read_back_as_they_were_written_in_any_order() {
    for expected in [
        ExpectedImage::new([], true),
        ExpectedImage::new([pcr0(1)], true),
        ExpectedImage::new([pcr0(1), pcr0(2)], false),
        ExpectedImage::new([pcr0(2), pcr0(1)], true),
    ] {
        let text = serde_json::to_string(&expected).unwrap();
        assert_eq!(serde_json::from_str::<ExpectedImage>(&text).unwrap(), expected, "{text}");
    }
    assert_eq!(ExpectedImage::new([pcr0(1), pcr0(2)], false), ExpectedImage::new([pcr0(2), pcr0(1)], false));
    let pcr = "cd".repeat(48);
    for bad in [
        r#"{"any_of":[{}]}"#.to_owned(),
        format!(r#"{{"any_of":[{{"pcr0":"{pcr}"}},{{}}]}}"#),
        format!(r#"{{"pcr0":"{pcr}","any_of":[{{"pcr1":"{pcr}"}}]}}"#),
        format!(r#"{{"any_of":[{{"pcr3":"{pcr}"}}]}}"#),
        r#"{"signed":1}"#.to_owned(),
    ] {
        assert!(serde_json::from_str::<ExpectedImage>(&bad).is_err(), "{bad}");
    }
}

#[test]
fn a_set_that_pins_nothing_is_the_same_as_no_set() {
    assert!(ExpectedImage::from(Pins::default()).is_empty());
    assert!(ExpectedImage::new([pcr0(1), Pins::default()], false).is_empty());
    assert_eq!(ExpectedImage::new([pcr0(1)], false).digests().count(), 0);
    let pinned = Pins { sha256: Some(EifDigest([7; 32])), ..pcr0(1) };
    assert_eq!(ExpectedImage::new([pcr0(1), pinned], false).digests().collect::<Vec<_>>(), [EifDigest([7; 32])]);
}
