//! JSON as values, with every number exactly as it is written.
//!
//! serde_json reads a float of many digits one unit off unless a feature of it is on, for every crate of a build. So floats
//! are read here where there are any: no schema of ours has one, but conversion keeps what it doesn't know as it is.

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;

/// Reads a value.
///
/// # Errors
/// If the text is no JSON, or deeper than serde_json allows.
pub fn read(text: &str) -> serde_json::Result<Value> {
    let value: Value = serde_json::from_str(text)?;
    if !has_floats(&value) {
        return Ok(value);
    }
    let mut numbers = Numbers { bytes: text.as_bytes() };
    let mut deserializer = serde_json::Deserializer::from_str(text);
    Exactly(&mut numbers).deserialize(&mut deserializer)
}

fn has_floats(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(items) => items.iter().any(has_floats),
        Value::Object(members) => members.values().any(has_floats),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

/// The numbers of a text that is known to be JSON, in their order.
struct Numbers<'a> {
    bytes: &'a [u8],
}

impl<'a> Iterator for Numbers<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        loop {
            match self.bytes {
                [b'"', rest @ ..] => self.bytes = behind_text(rest),
                [b'-' | b'0'..=b'9', ..] => {
                    let is_part = |byte: &u8| matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9');
                    let end = self.bytes.iter().position(|byte| !is_part(byte)).unwrap_or(self.bytes.len());
                    let (number, rest) = self.bytes.split_at_checked(end)?;
                    self.bytes = rest;
                    return std::str::from_utf8(number).ok();
                }
                [_, rest @ ..] => self.bytes = rest,
                [] => return None,
            }
        }
    }
}

/// What follows a text whose opening quote was taken.
fn behind_text(mut bytes: &[u8]) -> &[u8] {
    loop {
        match bytes {
            [b'\\', _, rest @ ..] | [b'\\', rest @ ..] => bytes = rest,
            [b'"', rest @ ..] => return rest,
            [_, rest @ ..] => bytes = rest,
            [] => return bytes,
        }
    }
}

/// Reads a value, and takes its floats from [`Numbers`], which has them in the order in which they are visited.
struct Exactly<'s, 'a>(&'s mut Numbers<'a>);

impl<'de> DeserializeSeed<'de> for Exactly<'_, '_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Exactly<'_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        self.0.next();
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        self.0.next();
        Ok(value.into())
    }

    fn visit_f64<E>(self, near: f64) -> Result<Value, E> {
        let exact = self.0.next().and_then(|text| text.parse().ok()).unwrap_or(near);
        Ok(Number::from_f64(exact).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(item) = items.next_element_seed(Exactly(self.0))? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            all.insert(key, members.next_value_seed(Exactly(self.0))?);
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(text: &str) -> String {
        read(text).unwrap().to_string()
    }

    #[test]
    fn floats_of_many_digits_come_back_as_they_were() {
        // What serde_json alone reads one unit off.
        for number in
            ["64.61685636720556", "-2.2250738585072011e-308", "1.7976931348623157e308", "0.1", "5e-324"]
        {
            let value = read(number).unwrap();
            assert_eq!(
                value.as_f64().unwrap().to_bits(),
                number.parse::<f64>().unwrap().to_bits(),
                "{number}"
            );
            assert_eq!(read(&value.to_string()).unwrap(), value);
        }
        let mut random = fastrand::Rng::with_seed(7);
        let (mut tried, mut differ) = (0, 0);
        while tried < 20_000 {
            let float = f64::from_bits(random.u64(..));
            if !float.is_finite() {
                continue;
            }
            tried += 1;
            let text = Value::from(float).to_string();
            assert_eq!(read(&text).unwrap().as_f64().unwrap().to_bits(), float.to_bits(), "{text}");
            differ += u32::from(serde_json::from_str::<f64>(&text).unwrap().to_bits() != float.to_bits());
        }
        assert!(differ > 0, "serde_json reads floats exactly: this file is of no use any more");
    }

    #[test]
    fn numbers_are_told_from_texts_and_keys_that_look_like_them() {
        let text = r#"{"1.5":"2.5","a\"3.5":[4,64.61685636720556,"\\",-6,{"b":7.25e1,"c":"\u00358.5"}],"d":18446744073709551615,"d":null}"#;
        let value: Value = read(text).unwrap();
        assert_eq!(value["a\"3.5"][1].as_f64().unwrap().to_bits(), 64.616_856_367_205_56_f64.to_bits());
        assert_eq!(
            (&value["a\"3.5"][0], &value["a\"3.5"][3], &value["a\"3.5"][4]["b"]),
            (&4.into(), &(-6).into(), &72.5.into())
        );
        assert_eq!((&value["1.5"], &value["d"]), (&"2.5".into(), &Value::Null));
    }

    #[test]
    fn what_is_no_json_is_refused_as_before() {
        for text in ["", "{", "1.5.5", "[1.5,]", "nul", "\"", &"[".repeat(200)] {
            assert!(read(text).is_err(), "{text}");
        }
        assert_eq!(again("[1.5,\"é\"]"), "[1.5,\"é\"]");
    }
}
