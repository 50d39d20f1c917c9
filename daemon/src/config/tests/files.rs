//! Configurations on disk: several files, and files that can't be read.

use super::super::*;
use super::{SIGNER, errors, source};

fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }
    dir
}

fn load_error(dir: &tempfile::TempDir) -> String {
    let error = load(&dir.path().join("enclaved.toml")).unwrap_err().to_string();
    error.replace(dir.path().to_str().unwrap(), "")
}

#[test]
fn files_in_conf_d_add_enclaves_and_tables_in_the_order_of_their_names() {
    let dir = folder(&[
        ("enclaved.toml", b"[host]\ndrain = \"1s\""),
        ("conf.d/20-signer.toml", SIGNER.as_bytes()),
        ("conf.d/10-ledger.toml", SIGNER.replace("signer", "ledger").as_bytes()),
        ("conf.d/30.toml", b"[host]\nreserve_cpus = 4"),
        ("conf.d/.#30.toml", b"an editor's own"),
        ("conf.d/40.toml.disabled", b"switched off"),
    ]);
    let config = load(&dir.path().join("enclaved.toml")).unwrap();
    let names: Vec<_> =
        config.sources.iter().map(|source| source.path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["enclaved.toml", "10-ledger.toml", "20-signer.toml", "30.toml"]);
    assert_eq!(config.desired.enclaves.len(), 2);
    assert_eq!(config.desired.host.drain, Duration::from_secs(1));
    assert_eq!(config.desired.host.reserve_cpus, 4);
    assert_eq!(parse(&config.sources).unwrap(), config, "the kept copy reads back the same");
}

#[test]
fn a_key_that_two_files_set_is_refused_and_both_places_are_named() {
    let error = parse(&[
        source("a.toml", "[metrics]\nlisten = \"127.0.0.1:1\""),
        source("b.toml", "[host]\n\n[metrics]\nlisten = \"127.0.0.1:2\""),
    ]);
    assert_eq!(
        error.unwrap_err().to_string(),
        "b.toml:4:1: [metrics] listen: is set here and at a.toml:2:1: a key may be set in one file only"
    );
}

#[test]
fn two_files_may_not_name_the_same_enclave() {
    let error = parse(&[source("a.toml", SIGNER), source("b.toml", format!("\n{SIGNER}"))]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "b.toml:3:8: [[enclave]] \"signer\" name: another enclave has this name, at a.toml:2:8"
    );
}

#[test]
fn errors_of_all_files_come_together_in_order() {
    let error = parse(&[source("a.toml", "x = 1\n[host]\ny = 2"), source("b.toml", "[metrics]\nz = 3")]).unwrap_err();
    let places: Vec<_> = error.iter().map(|error| error.to_string().split(": ").next().unwrap().to_owned()).collect();
    assert_eq!(places, ["a.toml:1:1", "a.toml:3:1", "b.toml:2:1"]);
}

#[test]
fn the_run_directory_is_found_also_in_a_file_that_is_otherwise_wrong() {
    let dir = folder(&[("enclaved.toml", b"[host]\nrun_dir = \"/x\"\nfoo = 1"), ("other.toml", b"[host")]);
    assert_eq!(run_dir(&dir.path().join("enclaved.toml")), Path::new("/x"));
    assert_eq!(run_dir(&dir.path().join("other.toml")), Path::new(DEFAULT_RUN_DIR));
    assert_eq!(run_dir(&dir.path().join("absent.toml")), Path::new(DEFAULT_RUN_DIR));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let dir = folder(&[]);
    assert_eq!(load_error(&dir), "/enclaved.toml: can't be read: No such file or directory (os error 2)");
}

#[test]
fn a_folder_in_the_place_of_a_file_is_refused() {
    let dir = folder(&[("enclaved.toml/x", b"")]);
    assert_eq!(load_error(&dir), "/enclaved.toml: is not a file");
}

#[test]
fn a_file_that_is_not_utf_8_names_the_place() {
    let dir = folder(&[("enclaved.toml", b""), ("conf.d/a.toml", b"[host]\n# \xff")]);
    assert_eq!(load_error(&dir), "/conf.d/a.toml:2:3: not TOML: the text is not UTF-8 here");
}

#[test]
fn a_huge_file_is_refused_unread() {
    let dir = folder(&[("enclaved.toml", &vec![b'\n'; 1 + usize::try_from(MAX_FILE_BYTES).unwrap()])]);
    assert_eq!(load_error(&dir), "/enclaved.toml: is larger than 1048576 bytes");
}

#[test]
fn too_many_files_are_refused() {
    let dir = folder(&[("enclaved.toml", b"")]);
    fs::create_dir(dir.path().join("conf.d")).unwrap();
    for number in 0..MAX_FILES {
        fs::write(dir.path().join(format!("conf.d/{number}.toml")), "").unwrap();
    }
    assert_eq!(load_error(&dir), "/conf.d: holds 64 files or more; at most 63 are allowed");
}

#[test]
fn nesting_beyond_all_need_is_refused() {
    let deep = |levels: usize| format!("a = {}{}", "[".repeat(levels), "]".repeat(levels));
    assert!(errors(&deep(20)).contains("nested more than 16 levels deep"));
    assert!(errors(&deep(100_000)).starts_with("t.toml:1:"));
    let dotted = format!("[{}]\n", vec!["a"; 70].join("."));
    assert!(errors(&dotted).contains("nested more than 16 levels deep"));
    let both = format!("{dotted}{0} = {{ {0} = {{ {0} = {{ {0} = 1 }} }} }}", vec!["a"; 70].join("."));
    assert!(errors(&both).contains("nested more than 16 levels deep"));
}
