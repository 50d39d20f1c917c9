//! Measures an image file, with the daemon's own code. The file is read once, in pieces.

use super::CtlError;
use enclaved_core::image::{EifReport, Limits, Measurer, os_image_hash, required_memory};
use serde_json::json;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// The measurements of the image at `path`, as the part of a configuration that pins them, or as JSON.
pub(super) fn measure(path: &Path, json: bool) -> Result<String, CtlError> {
    let report = read(path)?;
    Ok(if json { as_json(&report)? } else { as_text(path, &report) })
}

fn read(path: &Path) -> Result<EifReport, CtlError> {
    let unreadable = |error: std::io::Error| CtlError::Usage(format!("{}: can't be read: {error}", path.display()));
    let damaged = |error| CtlError::Unfit(format!("{}: {error}", path.display()));
    let mut file = File::open(path).map_err(unreadable)?;
    let mut measurer = Measurer::new(Limits::default());
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return measurer.finish().map_err(damaged),
            Ok(length) => measurer.update(piece.get(..length).unwrap_or_default()).map_err(damaged)?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
}

fn as_json(report: &EifReport) -> Result<String, CtlError> {
    let bug = |error: serde_json::Error| CtlError::Bug(format!("writing the report: {error}"));
    let mut value = serde_json::to_value(report).map_err(bug)?;
    if let Some(object) = value.as_object_mut() {
        object.insert("os_image_hash".into(), json!(hex(&os_image_hash(report.measurements()))));
        object.insert("required_memory_mib".into(), json!(required_memory(report.size()).0));
    }
    Ok(format!("{value:#}\n"))
}

/// What is not measured or for people only stands in comments, so that the whole can be pasted into a configuration.
fn as_text(path: &Path, report: &EifReport) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    line(format!("# {}: a good image, {} ({} bytes)", path.display(), super::text::mib(report.size()), report.size()));
    line(format!(
        "# EIF version {} for {}; needs memory_mib = {} or more",
        report.version(),
        report.architecture(),
        required_memory(report.size()).0
    ));
    if let Some(metadata) = report.metadata() {
        let said = [("name", &metadata.name), ("version", &metadata.version), ("built", &metadata.build_time)];
        let said: Vec<_> =
            said.iter().filter_map(|(what, value)| Some(format!("{what} {}", value.as_ref()?))).collect();
        if !said.is_empty() {
            line(format!("# says of itself (not measured): {}", said.join(", ")));
        }
    }
    if let Some(signature) = report.signature() {
        line(format!(
            "# signed ({}) by {}, valid until {}",
            signature.algorithm, signature.subject, signature.not_after
        ));
    }
    line(format!("# OS_IMAGE_HASH {}", hex(&os_image_hash(report.measurements()))));
    line("[enclave.measurements]".to_owned());
    line(format!("sha256 = \"{}\"", report.digest()));
    let measurements = report.measurements();
    let registers = [
        ("pcr0", Some(measurements.pcr0)),
        ("pcr1", Some(measurements.pcr1)),
        ("pcr2", Some(measurements.pcr2)),
        ("pcr8", measurements.pcr8),
    ];
    for (name, value) in registers {
        if let Some(value) = value {
            line(format!("{name} = \"{value}\""));
        }
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_image_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.eif");
        std::fs::write(&path, "not an image").unwrap();
        let error = measure(&path, false).unwrap_err();
        assert_eq!(error.code(), 78);
        assert!(error.to_string().contains("x.eif: not an EIF"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = measure(Path::new("/nonexistent/x.eif"), false).unwrap_err();
        assert_eq!(error.code(), 64);
        assert!(error.to_string().contains("/nonexistent/x.eif"), "{error}");
    }
}
