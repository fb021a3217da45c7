//! Whether an item is what the evaluation's JSON schema says: types, required fields, enumerations
//! and lists. Other keywords of JSON schema are not looked at.

use serde_json::Value;

/// Schemas within each other that are looked at.
const MAX_DEPTH: usize = 16;

/// The first difference between `value` and `schema`: where in `value`, and what.
pub(super) fn difference(schema: &Value, value: &Value) -> Option<(String, String)> {
    difference_at(schema, value, String::new(), 0)
}

fn difference_at(
    schema: &Value,
    value: &Value,
    place: String,
    depth: usize,
) -> Option<(String, String)> {
    if depth > MAX_DEPTH {
        return None;
    }
    if let Some(allowed) = allowed_types(schema)
        && !allowed.iter().any(|name| is_of_type(value, name))
    {
        return Some((place, format!("must be {}, not {value}", allowed.join(" or "))));
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        return Some((place, format!("must be one of {}", schema["enum"])));
    }
    if let Value::Object(fields) = value {
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !fields.contains_key(name) {
                return Some((place, format!("has no `{name}`, which is required")));
            }
        }
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            if let Some(field) = fields.get(name) {
                let found = difference_at(inner, field, format!("{place}.{name}"), depth + 1);
                if found.is_some() {
                    return found;
                }
            }
        }
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        let found = difference_at(&schema["items"], item, format!("{place}[{index}]"), depth + 1);
        if found.is_some() {
            return found;
        }
    }
    None
}

fn allowed_types(schema: &Value) -> Option<Vec<&str>> {
    let types = &schema["type"];
    if let Some(name) = types.as_str() {
        return Some(vec![name]);
    }
    Some(types.as_array()?.iter().filter_map(Value::as_str).collect())
}

/// A type that JSON schema does not know is no reason to refuse.
fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0)
        }
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_difference_is_named_with_its_place() {
        let schema = json!({
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "size": {"type": ["number", "null"]},
                "count": {"type": "integer"},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
                "inner": {"type": "object", "required": ["x"]},
            },
            "required": ["name"],
        });
        for (item, expected) in [
            (json!({"name": "n", "size": null, "count": 2.0, "tags": ["a"], "more": 1}), None),
            (json!({}), Some(("", "`name`"))),
            (json!([]), Some(("", "must be object"))),
            (json!({"name": 3}), Some((".name", "must be string, not 3"))),
            (json!({"name": "n", "size": "big"}), Some((".size", "number or null"))),
            (json!({"name": "n", "count": 2.5}), Some((".count", "integer"))),
            (json!({"name": "n", "tags": ["a", "c"]}), Some((".tags[1]", "one of"))),
            (json!({"name": "n", "inner": {}}), Some((".inner", "`x`"))),
        ] {
            let found = difference(&schema, &item);
            assert_eq!(found.is_some(), expected.is_some(), "{item}: {found:?}");
            if let (Some((place, message)), Some((known_place, part))) = (found, expected) {
                assert_eq!(place, known_place);
                assert!(message.contains(part), "{message}");
            }
        }
        assert_eq!(difference(&json!({}), &json!(1)), None);
    }
}
