//! The EIF format: parsing, measuring, verifying.
