//! A judge of JSON by a JSON schema, as far as our own schemas go: a keyword that it does not know fails the test, so that
//! nothing is let through for being new. It shares no code with what makes the schemas.

use serde_json::Value;

/// Says nothing about what is valid.
const ANNOTATIONS: [&str; 7] = ["$schema", "$defs", "title", "description", "default", "format", "examples"];

/// Where a value differs from a schema, and how. `root` holds the definitions.
pub(crate) fn violations(root: &Value, schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    judge(root, schema, value, "$", &mut found);
    found
}

fn judge(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let fits = |schema: &Value| violations(root, schema, value).is_empty();
    let Some(keywords) = schema.as_object() else {
        // `true` lets all pass, `false` nothing.
        assert!(schema.is_boolean(), "{schema} is no schema");
        if schema == false {
            found.push(format!("{at} must not be there"));
        }
        return;
    };
    for (keyword, of) in keywords {
        let fine = match keyword.as_str() {
            "$ref" => {
                let definition = root.pointer(of.as_str().unwrap().strip_prefix('#').unwrap()).unwrap();
                judge(root, definition, value, at, found);
                true
            }
            "type" => match of {
                Value::Array(types) => types.iter().any(|name| is(value, name)),
                name => is(value, name),
            },
            "const" => value == of,
            "enum" => of.as_array().unwrap().contains(value),
            "anyOf" => of.as_array().unwrap().iter().any(fits),
            "oneOf" => of.as_array().unwrap().iter().filter(|schema| fits(schema)).count() == 1,
            "minimum" => value.as_f64().is_none_or(|number| number >= of.as_f64().unwrap()),
            "maximum" => value.as_f64().is_none_or(|number| number <= of.as_f64().unwrap()),
            "pattern" => {
                let pattern = regex_lite::Regex::new(of.as_str().unwrap()).unwrap();
                value.as_str().is_none_or(|text| pattern.is_match(text))
            }
            "required" => {
                let has = |name: &Value| value.get(name.as_str().unwrap()).is_some();
                !value.is_object() || of.as_array().unwrap().iter().all(has)
            }
            "properties" => {
                for (name, schema) in of.as_object().unwrap() {
                    if let Some(value) = value.get(name) {
                        judge(root, schema, value, &format!("{at}.{name}"), found);
                    }
                }
                true
            }
            "additionalProperties" => {
                for (name, value) in value.as_object().into_iter().flatten() {
                    if schema.get("properties").is_none_or(|known| known.get(name).is_none()) {
                        judge(root, of, value, &format!("{at}.{name}"), found);
                    }
                }
                true
            }
            "items" => {
                for (index, value) in value.as_array().into_iter().flatten().enumerate() {
                    judge(root, of, value, &format!("{at}[{index}]"), found);
                }
                true
            }
            keyword => {
                assert!(ANNOTATIONS.contains(&keyword), "the keyword {keyword} is not known here");
                true
            }
        };
        if !fine {
            found.push(format!("{at} is {value}, which does not fit {keyword}: {of}"));
        }
    }
}

fn is(value: &Value, name: &Value) -> bool {
    match name.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("{other} is no type"),
    }
}

#[test]
fn what_does_not_fit_a_schema_is_found_and_what_fits_is_not() {
    let schema = serde_json::json!({
        "$defs": { "port": { "type": "integer", "minimum": 1, "maximum": 65535 } },
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": { "type": "string", "pattern": "^[a-z]+$" },
            "ports": { "type": "array", "items": { "$ref": "#/$defs/port" } },
            "state": { "oneOf": [{ "const": "up" }, { "const": "down" }] },
            "pid": { "anyOf": [{ "type": ["integer", "null"] }, { "enum": ["none"] }] },
        },
        "additionalProperties": { "type": "boolean" },
    });
    let found = |value: Value| violations(&schema, &schema, &value).len();
    let good = serde_json::json!({ "name": "a", "ports": [1, 65535], "state": "up", "pid": null, "else": true });
    assert_eq!(found(good.clone()), 0);
    for (name, bad) in [
        ("name", serde_json::json!("A")),
        ("name", serde_json::json!(1)),
        ("ports", serde_json::json!([0])),
        ("ports", serde_json::json!([65536])),
        ("ports", serde_json::json!(["1"])),
        ("ports", serde_json::json!({})),
        ("state", serde_json::json!("sideways")),
        ("pid", serde_json::json!("some")),
        ("else", serde_json::json!(1)),
    ] {
        let mut value = good.clone();
        value[name] = bad;
        assert_eq!(found(value.clone()), 1, "{value}");
    }
    assert_eq!(found(serde_json::json!({})), 1);
    assert_eq!(found(serde_json::json!([])), 1);
}
