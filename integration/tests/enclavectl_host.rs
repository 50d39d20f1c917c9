//! `enclavectl host` on recorded hosts.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use enclaved_integration::binaries;
use enclaved_integration::host_tree::{HostTree, SHAPES};
use std::process::Command;

fn enclavectl(tree: &HostTree, json: bool) -> String {
    let mut command = Command::new(binaries::find("enclavectl").unwrap());
    command.arg("--config").arg(tree.path().join("enclaved.toml")).arg("host").arg("--root").arg(tree.path());
    let output = command.args(json.then_some("--json")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn configured(shape: &str, cpus: u32, memory: u64) -> HostTree {
    let tree = HostTree::unpack(shape).unwrap();
    let config = format!(
        "[host]\nallocator = \"verify\"\n\n[[enclave]]\nname = \"signer\"\nimage = \"file:///x\"\ncpus = {cpus}\nmemory_mib = {memory}\nupdate = \"recreate\"\n"
    );
    tree.write("enclaved.toml", &config).unwrap();
    tree
}

fn assert_holds(text: &str, part: &str) {
    assert!(text.contains(part), "no {part:?} in\n{text}");
}

#[test]
fn a_host_shows_what_it_has_what_enclaves_may_have_and_what_to_do() {
    let text = enclavectl(&configured("m5.xlarge", 2, 4096), false);
    for part in [
        "  instance: m5.xlarge\n",
        "      CPUs: 4 (4 online)\n",
        "    memory: node 0: 15523 MiB, 13971 MiB free; hugepages: none\n",
        "    driver: loaded\n",
        "  its file: reserves 2 CPUs and 512 MiB\n",
        "  reserved: no CPUs, 0 MiB in hugepages\n",
        "   running: 0 enclaves\n",
        "  may have: 2 CPUs and 13474 MiB (nominally 2 CPUs and 14 GiB; 2 CPUs and 2048 MiB stay with the parent)\n",
        "configured: 2 CPUs and 4096 MiB\n",
        "- nitro-enclaves-allocator.service is not enabled",
        "- the configured enclaves need 2 CPUs and 4096 MiB, which is not reserved; all that enclaves may have would be `---`, \
         `memory_mib: 13474`, `cpu_count: 2` in /etc/nitro_enclaves/allocator.yaml",
    ] {
        assert_holds(&text, part);
    }
}

#[test]
fn enclaves_that_do_not_fit_are_refused_with_both_ways_out() {
    let text = enclavectl(&configured("m5.xlarge", 4, 4096), false);
    assert_holds(&text, "configured: signer can't be launched\n");
    assert_holds(
        &text,
        "- signer can't be launched: the enclaves do not fit this host: 4 CPUs are needed, 2 can be had",
    );
    assert_holds(&text, "m5.2xlarge is the smallest m5 with room");
}

#[test]
fn a_host_with_everything_reserved_needs_no_change_and_a_full_one_waits() {
    let text = enclavectl(&configured("m5.8xlarge", 8, 16_384), false);
    assert!(!text.contains("systemctl restart"), "{text}");
    let text = enclavectl(&configured("m5.2xlarge", 4, 8192), false);
    assert_holds(&text, "   running: 1 enclave\n");
    assert_holds(&text, "1 enclave runs, and the allocator changes the pool only when none does");
}

#[test]
fn a_file_that_fails_a_missing_driver_and_a_missing_configuration_are_said() {
    let text = enclavectl(&HostTree::unpack("m5.4xlarge").unwrap(), false);
    assert_holds(
        &text,
        "- the allocator fails on /etc/nitro_enclaves/allocator.yaml: the value of memory_mib is `8192 # 8 GiB`",
    );
    assert_holds(&text, "the configuration can't be used, so nothing is said of its enclaves");
    let text = enclavectl(&HostTree::unpack("laptop").unwrap(), false);
    assert_holds(&text, "instance: unknown: this is no known EC2 instance");
    assert_holds(&text, "- the nitro_enclaves driver is not loaded: start the instance with enclaves enabled");
}

#[test]
fn every_recorded_host_is_shown_as_json_with_unknowns_by_name() {
    for shape in SHAPES {
        let json: serde_json::Value = serde_json::from_str(&enclavectl(&configured(shape, 2, 512), true)).unwrap();
        assert!(
            json["inventory"]["nitro_cli"]["unknown"]["message"].is_string()
                || json["inventory"]["nitro_cli"].is_string()
        );
        assert!(json["enclaves_may_have"]["one_of"][0]["cpus"].as_u64().unwrap() > 0, "{json:#}");
        assert!(json["advice"].is_array() && json["reserve"]["memory_mib"] == 2048);
    }
    let json: serde_json::Value = serde_json::from_str(&enclavectl(&configured("m5.24xlarge", 2, 512), true)).unwrap();
    assert_eq!(json["enclaves_may_have"]["one_of"][0]["node"], 1);
    assert_eq!(json["configured"]["fits"]["memory"], 512);
}
