//! Every form of the file that the allocator takes, refuses or misreads.

use super::*;
use proptest::prelude::*;

fn reservation(cpus: CpuRequest, memory: u64) -> Reservation {
    Reservation { cpus, memory_mib: MemoryMib(memory) }
}

fn pool(list: &str) -> CpuRequest {
    CpuRequest::Pool(list.parse().unwrap())
}

/// Taken as that, with a remark that holds each of these.
fn assert_taken(text: &str, cpus: CpuRequest, memory: u64, remarks: &[&str]) {
    let report = check(text);
    assert_eq!(report.outcome, Ok(reservation(cpus, memory)), "{text:?}: {:?}", report.remarks);
    assert_eq!(report.remarks.len(), remarks.len(), "{text:?}: {:?}", report.remarks);
    for (remark, part) in report.remarks.iter().zip(remarks) {
        assert!(remark.contains(part), "{text:?}: {remark}");
    }
}

fn assert_refused(text: &str, reason: &str) {
    let error = check(text).outcome.expect_err(text);
    assert!(error.contains(reason), "{text:?}: {error}");
}

#[test]
fn what_is_written_has_the_strict_form() {
    let text = write(&reservation(CpuRequest::Count(2), 512));
    assert_eq!(text, format!("---\n{MARK}\nmemory_mib: 512\ncpu_count: 2\n"));
    let text = write(&reservation(pool("1-3,9"), 14_336));
    assert_eq!(text, format!("---\n{MARK}\nmemory_mib: 14336\ncpu_pool: 1-3,9\n"));
}

#[test]
fn only_a_file_that_was_written_here_is_ours() {
    assert!(is_ours(&write(&reservation(CpuRequest::Count(2), 512))));
    assert!(!is_ours("---\nmemory_mib: 512\ncpu_count: 2\n"));
    assert!(!is_ours(""));
}

#[test]
fn plain_files_are_taken() {
    assert_taken("---\nmemory_mib: 512\ncpu_count: 2\n", CpuRequest::Count(2), 512, &[]);
    assert_taken("---\ncpu_pool: 2,3,6-9\nmemory_mib: 512\n", pool("2-3,6-9"), 512, &[]);
    // The file that the package brings.
    let stock = "---\n# Enclave configuration file.\n#\n# How much memory.\nmemory_mib: 512\n#\n# CPUs.\ncpu_count: 2\n#\n# cpu_pool: 2,3\n";
    assert_taken(stock, CpuRequest::Count(2), 512, &[]);
}

#[test]
fn blanks_where_the_script_drops_them_do_no_harm() {
    assert_taken("  ---\t\n  memory_mib:512\t\n\tcpu_count :  2  \n", CpuRequest::Count(2), 512, &[]);
    assert_taken("---\nmemory_mib: 512\ncpu_pool: 1, 3\n", pool("1,3"), 512, &[]);
    // Blank lines before the start are not read at all.
    assert_taken("\n\n---\nmemory_mib: 512\ncpu_count: 2\n", CpuRequest::Count(2), 512, &[]);
}

#[test]
fn double_quotes_count_only_after_a_blank_and_around_the_whole_value() {
    assert_taken("---\nmemory_mib: \"512\"\ncpu_pool: \"1,3\"\n", pool("1,3"), 512, &[]);
    assert_refused("---\nmemory_mib:\"512\"\ncpu_count: 2\n", "double quotes are understood only after a blank");
}

#[test]
fn single_quotes_become_part_of_the_value() {
    assert_refused("---\nmemory_mib: '512'\ncpu_count: 2\n", "`\\'512\\'`, which is not a number (single quotes");
    assert_refused("---\nmemory_mib: 512\ncpu_pool: '1,3'\n", "single quotes become part");
}

#[test]
fn a_comment_behind_a_value_becomes_part_of_it() {
    assert_refused(
        "---\nmemory_mib: 512 # half\ncpu_count: 2\n",
        "`512 # half`, which is not a number (a comment on the line",
    );
    assert_refused("---\nmemory_mib: 512\ncpu_pool: 1,3 # pool\n", "a comment on the line of a value");
    // The last colon counts, also one within a comment.
    assert_refused("---\nmemory_mib: 512 # in: MiB\ncpu_count: 2\n", "`MiB`, which is not a number");
}

#[test]
fn comment_lines_are_skipped_anywhere() {
    assert_taken("# first\n---\n# a\n  # b\nmemory_mib: 1\n#c\ncpu_count: 2\n# end\n", CpuRequest::Count(2), 1, &[]);
}

#[test]
fn without_the_start_nothing_is_read() {
    let text = "memory_mib: 512\ncpu_count: 2\n";
    assert_refused(text, "memory_mib is missing: no line is just `---`");
    assert!(check(text).remarks[0].contains("line 1 (`memory_mib: 512`) is not read"));
    assert_refused("", "memory_mib is missing: no line is just `---`");
    assert_refused("%YAML 1.2\n--- # start\nmemory_mib: 512\ncpu_count: 2\n", "no line is just `---`");
    // What stands before the start is lost, what follows counts.
    let text = "memory_mib: 99\n---\nmemory_mib: 512\ncpu_count: 2\n";
    assert_taken(text, CpuRequest::Count(2), 512, &["line 1 (`memory_mib: 99`) is not read"]);
}

#[test]
fn a_blank_line_after_the_start_fails() {
    assert_refused("---\n\nmemory_mib: 512\ncpu_count: 2\n", "line 2 is blank");
    assert_refused("---\nmemory_mib: 512\ncpu_count: 2\n \t\n", "line 4 is blank");
}

#[test]
fn the_last_line_counts_only_with_a_newline() {
    let text = "---\nmemory_mib: 512\ncpu_count: 2";
    assert_refused(text, "both cpu_count and cpu_pool are missing");
    assert!(check(text).remarks[0].contains("the last line (`cpu_count: 2`) is not read: there is no newline"));
    assert_taken("---\nmemory_mib: 512\ncpu_count: 2\ncpu_pool: 1", CpuRequest::Count(2), 512, &["the last line"]);
}

#[test]
fn unknown_keys_lists_and_document_ends_fail() {
    assert_refused("---\nmemory_mib: 512\ncpu_count: 2\nlog: x\n", "line 4 (`log: x`): unexpected key `log`");
    assert_refused("---\nMemory_MiB: 512\ncpu_count: 2\n", "unexpected key `Memory_MiB`");
    assert_refused("---\nmemory_mib: 512\ncpu_pool:\n  - 1\n", "the value of cpu_pool is missing");
    assert_refused("---\nmemory_mib: 512\n- 1\n", "unexpected key `-`");
    assert_refused("---\nmemory_mib: 512\ncpu_pool: [1, 3]\n", "lists in brackets");
    assert_refused("---\nmemory_mib: 512\ncpu_count: 2\n...\n", "unexpected key ``");
    assert_refused("---\n{memory_mib: 512, cpu_count: 2}\n", "unexpected key ``");
}

#[test]
fn exactly_one_kind_of_cpus_and_memory_are_needed() {
    assert_refused("---\ncpu_count: 2\n", "memory_mib is missing");
    assert_refused("---\nmemory_mib: 512\n", "both cpu_count and cpu_pool are missing");
    assert_refused("---\nmemory_mib: 512\ncpu_count: 2\ncpu_pool: 1,3\n", "only one of them may be");
    assert_refused("---\nmemory_mib:\ncpu_count: 2\n", "the value of memory_mib is missing");
    assert_refused("---\nmemory_mib: \"\ncpu_count: 2\n", "the value of memory_mib is missing");
}

#[test]
fn a_key_that_is_given_twice_counts_the_second_time() {
    let text = "---\nmemory_mib: 512\nmemory_mib: 1024\ncpu_count: 2\n";
    assert_taken(text, CpuRequest::Count(2), 1024, &["its former value, `512`, does not count"]);
}

#[test]
fn numbers_are_digits_alone() {
    for value in ["-1", "+2", "1.5", "0x200", "512M", "5 12", "five"] {
        assert_refused(&format!("---\nmemory_mib: {value}\ncpu_count: 2\n"), "which is not a number");
    }
    assert_refused("---\nmemory_mib 512\ncpu_count: 2\n", "which is not a number");
    assert_refused("---\nmemory_mib: 99999999999999999999\ncpu_count: 2\n", "more than any host has");
    assert_refused("---\nmemory_mib: 512\ncpu_count: 0\n", "must be more than 0");
    assert_taken("---\nmemory_mib: 0\ncpu_count: 2\n", CpuRequest::Count(2), 0, &["one page of the smallest size"]);
}

#[test]
fn a_leading_zero_makes_another_number() {
    assert_taken("---\nmemory_mib: 0512\ncpu_count: 2\n", CpuRequest::Count(2), 330, &["0512 is 330"]);
    assert_refused("---\nmemory_mib: 0899\ncpu_count: 2\n", "to base 8, which it is not");
    assert_refused("---\nmemory_mib: 512\ncpu_count: 08\n", "to base 8, which it is not");
}

#[test]
fn files_with_dos_line_ends_say_so() {
    let text = "---\r\nmemory_mib: 512\r\ncpu_count: 2\r\n";
    assert_refused(text, "memory_mib is missing");
    assert!(check(text).remarks[0].contains("carriage return"));
    assert_refused("---\nmemory_mib: 512\ncpu_count: 2\r\n", "carriage return: save the file with Unix line ends");
}

#[test]
fn a_backslash_joins_lines() {
    let text = "---\n# C:\\\nmemory_mib: 512\ncpu_count: 2\n";
    assert_refused(text, "memory_mib is missing");
    assert!(check(text).remarks[0].contains("line 2 ends with a backslash"));
    assert_taken("---\nmemory_\\mib: 5\\12\ncpu_count: 2\n", CpuRequest::Count(2), 512, &[]);
}

#[test]
fn a_pool_that_the_kernel_refuses_is_refused() {
    for value in ["all", "3-1", "1-", "99999"] {
        assert_refused(
            &format!("---\nmemory_mib: 512\ncpu_pool: {value}\n"),
            "the kernel refuses the value of cpu_pool",
        );
    }
}

proptest! {
    #[test]
    fn what_is_written_is_taken_as_it_was_meant(
        memory in 1_u64..MAX_MEMORY,
        count in 1_u32..2048,
        cpus in prop::collection::btree_set(0_u32..8192, 1..300),
        by_count in any::<bool>(),
    ) {
        let cpus = if by_count { CpuRequest::Count(count) } else { CpuRequest::Pool(CpuSet::new(cpus).unwrap()) };
        let meant = reservation(cpus, memory);
        let report = check(&write(&meant));
        prop_assert_eq!(report, FileReport { outcome: Ok(meant), remarks: vec![] });
    }

    #[test]
    fn no_file_makes_the_checker_panic(text in "(---\n)?((memory_mib|cpu_count|cpu_pool|\\PC{0,5}):? ?[-0-9,\"'#\\\\ \r]{0,8}\n?){0,6}") {
        let report = check(&text);
        if let Ok(reservation) = report.outcome {
            prop_assert!(reservation.memory_mib.0 <= MAX_MEMORY);
        }
    }
}
