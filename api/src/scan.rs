//! Goes through JSON once and reads only what is asked for, which is most of what a review costs.
//!
//! Nothing here says that a whole text is JSON: in what is passed over, brackets are counted and strings are skipped.

use memchr::memchr2;
use serde::Deserialize;
use std::borrow::Cow;

/// What is wrong with a text.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// Brackets, quotes, colons or commas are not where they belong.
    #[error("it is no JSON, or ends too early")]
    NoJson,
    /// Something else stands where an object has to be.
    #[error("there is no object where one has to be")]
    NoObject,
    /// Something else stands where a list has to be.
    #[error("there is no list where one has to be")]
    NoList,
    /// Something else stands where a text has to be.
    #[error("there is no text where one has to be")]
    NoText,
    /// A list has more items than anybody sends.
    #[error("a list has more than {0} items")]
    TooMany(usize),
    /// It can't be converted.
    #[error(transparent)]
    Conversion(#[from] crate::convert::ConvertError),
    /// What was read is no JSON, or of another type.
    #[error(transparent)]
    Value(#[from] serde_json::Error),
}

type Result<T> = std::result::Result<T, Unreadable>;

/// A place in a text.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// At the start of a text.
    pub(crate) fn of(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// Goes through the members of an object, if it is not `null`. `each` gets the key and has to take the value.
    ///
    /// # Errors
    /// Where it is neither; and those of `each`.
    pub(crate) fn object(
        &mut self,
        mut each: impl FnMut(&str, &mut Self) -> Result<()>,
    ) -> Result<Option<()>> {
        match self.peek() {
            Some(b'{') => self.at += 1,
            _ if self.takes_null() => return Ok(None),
            _ => return Err(Unreadable::NoObject),
        }
        if self.takes(b'}') {
            return Ok(Some(()));
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(Unreadable::NoJson);
            }
            let key = self.string()?;
            if !self.takes(b':') {
                return Err(Unreadable::NoJson);
            }
            each(&key, self)?;
            if !self.takes(b',') {
                return if self.takes(b'}') { Ok(Some(())) } else { Err(Unreadable::NoJson) };
            }
        }
    }

    /// Goes through an object for one member, which `read` takes; the last of its name. Nothing for `null` in place of the object.
    ///
    /// # Errors
    /// As [`Self::object`].
    pub(crate) fn member<T>(
        &mut self,
        name: &str,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Option<Option<T>>> {
        let mut found = None;
        let there = self.object(|key, value| {
            if key != name {
                return value.skip();
            }
            found = Some(read(value)?);
            Ok(())
        })?;
        Ok(there.map(|()| found))
    }

    /// Goes through a list, if it is not `null`. `each` has to take the item.
    ///
    /// # Errors
    /// Where it is neither; and those of `each`.
    pub(crate) fn list(&mut self, mut each: impl FnMut(&mut Self) -> Result<()>) -> Result<Option<()>> {
        match self.peek() {
            Some(b'[') => self.at += 1,
            _ if self.takes_null() => return Ok(None),
            _ => return Err(Unreadable::NoList),
        }
        if self.takes(b']') {
            return Ok(Some(()));
        }
        loop {
            each(self)?;
            if !self.takes(b',') {
                return if self.takes(b']') { Ok(Some(())) } else { Err(Unreadable::NoJson) };
            }
        }
    }

    /// Takes a value, whatever it is: its text.
    ///
    /// # Errors
    /// Where none begins, or it does not end.
    pub(crate) fn value(&mut self) -> Result<&'a str> {
        let bytes = self.text.as_bytes();
        let first = self.peek().ok_or(Unreadable::NoJson)?;
        let begin = self.at;
        let end = match first {
            b'"' => behind_string(bytes, begin + 1),
            b'{' | b'[' => behind_nested(bytes, begin + 1),
            b'}' | b']' | b',' | b':' => None,
            _ => Some(behind_word(bytes, begin + 1)),
        };
        self.at = end.ok_or(Unreadable::NoJson)?;
        self.text.get(begin..self.at).ok_or(Unreadable::NoJson)
    }

    /// Takes a value that is not needed.
    ///
    /// # Errors
    /// As [`Self::value`].
    pub(crate) fn skip(&mut self) -> Result<()> {
        self.value().map(drop)
    }

    /// Reads a value, and takes it.
    ///
    /// # Errors
    /// Where it is no JSON, or of another type. Then it is not taken.
    pub(crate) fn read<T: Deserialize<'a>>(&mut self) -> Result<T> {
        let rest = self.text.get(self.at..).ok_or(Unreadable::NoJson)?;
        let mut values = serde_json::Deserializer::from_str(rest).into_iter();
        let value = values.next().ok_or(Unreadable::NoJson)??;
        self.at += values.byte_offset();
        Ok(value)
    }

    /// The text from `begin`, an earlier place in the same text, up to here.
    pub(crate) fn since(&self, begin: &Self) -> &'a str {
        self.text.get(begin.at..self.at).unwrap_or_default()
    }

    /// Takes a text.
    ///
    /// # Errors
    /// Where there is none.
    pub(crate) fn string(&mut self) -> Result<Cow<'a, str>> {
        if self.peek() != Some(b'"') {
            return Err(Unreadable::NoText);
        }
        let rest = self.text.get(self.at + 1..).ok_or(Unreadable::NoJson)?;
        let end = rest.bytes().position(|byte| byte < b' ' || matches!(byte, b'"' | b'\\'));
        let plain = end.and_then(|end| rest.split_at_checked(end)).filter(|(_, rest)| rest.starts_with('"'));
        let Some((plain, _)) = plain else { return Ok(Cow::Owned(self.read()?)) };
        self.at += plain.len() + 2;
        Ok(Cow::Borrowed(plain))
    }

    /// Takes a `null`, if there is one.
    pub(crate) fn takes_null(&mut self) -> bool {
        let is_there = self.peek() == Some(b'n')
            && self.text.get(self.at..).is_some_and(|rest| rest.starts_with("null"));
        self.at += if is_there { 4 } else { 0 };
        is_there
    }

    /// That nothing follows.
    ///
    /// # Errors
    /// If something does.
    pub(crate) fn end(&mut self) -> Result<()> {
        if self.peek().is_none() { Ok(()) } else { Err(Unreadable::NoJson) }
    }

    /// The next byte that is no space; it stays.
    fn peek(&mut self) -> Option<u8> {
        loop {
            let byte = *self.text.as_bytes().get(self.at)?;
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(byte);
            }
            self.at += 1;
        }
    }

    fn takes(&mut self, byte: u8) -> bool {
        let is_there = self.peek() == Some(byte);
        self.at += usize::from(is_there);
        is_there
    }
}

/// Behind the end of a string whose opening quote is before `at`.
fn behind_string(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let rest = bytes.get(at..)?;
        // Most are so short that a call costs more.
        let found = match rest.first_chunk().map(|word| first_mark(*word)) {
            Some(8) | None => memchr2(b'"', b'\\', rest)?,
            Some(found) => found,
        };
        if rest.get(found) == Some(&b'"') {
            return Some(at + found + 1);
        }
        at += found + 2;
    }
}

/// Where the first quote or backslash is; 8 if there is none.
fn first_mark(word: [u8; 8]) -> usize {
    const ONES: u64 = u64::from_le_bytes([1; 8]);
    const HIGH: u64 = u64::from_le_bytes([0x80; 8]);
    let word = u64::from_le_bytes(word);
    // Bytes that are zero get their highest bit; of others only some behind the first such.
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGH;
    let quotes = zeros(word ^ u64::from_le_bytes([b'"'; 8]));
    let escapes = zeros(word ^ u64::from_le_bytes([b'\\'; 8]));
    let first = (quotes | escapes).trailing_zeros() / 8;
    usize::try_from(first).unwrap_or(8)
}

/// Behind the end of an object or array whose opening bracket is before `at`.
fn behind_nested(bytes: &[u8], mut at: usize) -> Option<usize> {
    let mut depth = 1_usize;
    loop {
        let byte = *bytes.get(at)?;
        at += 1;
        match byte {
            b'"' => at = behind_string(bytes, at)?,
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
}

/// Behind the end of a number, `true`, `false` or `null`.
fn behind_word(bytes: &[u8], at: usize) -> usize {
    let rest = bytes.get(at..).unwrap_or_default();
    let is_end = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b':' | b'"' | b' ' | b'\t' | b'\n' | b'\r');
    at + rest.iter().position(is_end).unwrap_or(rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use serde_json::value::RawValue;
    use std::collections::BTreeMap;

    fn members(text: &str) -> Result<Vec<(String, String)>> {
        let (mut all, mut cursor) = (Vec::new(), Cursor::of(text));
        cursor.object(|key, value| {
            all.push((key.to_owned(), value.value()?.to_owned()));
            Ok(())
        })?;
        cursor.end()?;
        Ok(all)
    }

    #[test]
    fn members_are_found_whatever_is_in_them() {
        let text = " { \"a\" : {\"x\":[\"}\",{\"y\":\"\\\"]\"}]} ,\n\"b\":-1.5e3,\"c\\u0064\":\"\\\\\",\"e\":[],\"f\":null}\n ";
        let wanted = [
            ("a", "{\"x\":[\"}\",{\"y\":\"\\\"]\"}]}"),
            ("b", "-1.5e3"),
            ("cd", "\"\\\\\""),
            ("e", "[]"),
            ("f", "null"),
        ];
        let wanted = wanted.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(members(text).unwrap(), wanted);
        assert_eq!(members("{}").unwrap(), []);
        assert_eq!(members(" null").unwrap(), []);
    }

    #[test]
    fn what_is_no_object_is_told() {
        for text in ["", "[]", "nul", "3", "\"{}\""] {
            assert!(matches!(members(text), Err(Unreadable::NoObject)), "{text}");
        }
        let broken = [
            "{",
            "{\"a\"",
            "{\"a\":",
            "{\"a\":}",
            "{\"a\":1",
            "{\"a\":\"}",
            "{\"a\":[}",
            "{\"a\":1,}",
            "{a:1}",
            "{,}",
            "{\"a\" 1}",
            "{\"a\":1 \"b\":2}",
            "{\"a\":{\"b\":1}",
            "{\"a\\",
            "{}}",
            "{} {}",
        ];
        for text in broken {
            assert!(members(text).is_err(), "{text}");
        }
        for text in ["{\"a\u{1}\":1}", "{\"\\q\":1}"] {
            assert!(matches!(members(text), Err(Unreadable::Value(_))), "{text}");
        }
    }

    #[test]
    fn lists_are_gone_through_and_texts_are_read() {
        let (mut all, mut cursor) = (Vec::new(), Cursor::of(r#" [ "a", "b\u0021" ,"" ] "#));
        let each = |item: &mut Cursor<'_>| {
            all.push(item.string()?.into_owned());
            Ok(())
        };
        assert!(cursor.list(each).unwrap().is_some() && cursor.end().is_ok());
        assert_eq!(all, ["a", "b!", ""]);
        assert!(Cursor::of("null").list(|item| item.skip()).unwrap().is_none());
        assert!(Cursor::of("[]").list(|item| item.skip()).unwrap().is_some());
        for text in ["", "{}", "[1", "[,]", "[1,]", "[1 2]"] {
            assert!(Cursor::of(text).list(|item| item.skip()).is_err(), "{text}");
        }
        assert!(matches!(Cursor::of("3").string(), Err(Unreadable::NoText)));
        assert_eq!(Cursor::of(" 3 ").read::<u8>().unwrap(), 3);
    }

    #[test]
    fn one_member_is_found_among_others() {
        let read = |text: &str| Cursor::of(text).member("b", Cursor::read::<u8>);
        assert_eq!(read(r#"{"a":{"b":1},"b":2,"c":"b"}"#).unwrap(), Some(Some(2)));
        assert_eq!(read(r#"{"b":2,"b":3}"#).unwrap(), Some(Some(3)));
        assert_eq!(read(r#"{"a":1}"#).unwrap(), Some(None));
        assert_eq!(read("null").unwrap(), None);
        assert!(read(r#"{"b":"2"}"#).is_err() && read("[]").is_err());
    }

    /// Values of all kinds; `left` bounds the depth.
    fn value(random: &mut fastrand::Rng, left: usize) -> Value {
        let text = |random: &mut fastrand::Rng| -> String {
            let parts = ["a", "\"", "\\", "{", "}", "[", "]", ",", ":", "\n", "é", "\u{1F600}", " "];
            (0..random.usize(..6)).map(|_| parts[random.usize(..parts.len())]).collect()
        };
        match random.usize(..if left == 0 { 4 } else { 6 }) {
            0 => Value::Null,
            1 => random.bool().into(),
            2 => random.i32(..).into(),
            3 => text(random).into(),
            4 => (0..random.usize(..4)).map(|_| value(random, left - 1)).collect(),
            _ => Value::Object(
                (0..random.usize(..4)).map(|_| (text(random), value(random, left - 1))).collect(),
            ),
        }
    }

    #[test]
    fn the_same_members_are_found_as_by_reading() {
        let mut random = fastrand::Rng::with_seed(1);
        for case in 0..20_000 {
            let object: serde_json::Map<String, Value> =
                (0..random.usize(..5)).map(|n| (format!("{n}\"{n}"), value(&mut random, 4))).collect();
            let text = match case % 2 {
                0 => Value::Object(object).to_string(),
                _ => serde_json::to_string_pretty(&object).unwrap(),
            };
            let read: BTreeMap<String, &RawValue> = serde_json::from_str(&text).unwrap();
            let read: Vec<(String, String)> =
                read.into_iter().map(|(key, value)| (key, value.get().to_owned())).collect();
            assert_eq!(members(&text).unwrap(), read, "{text}");
            let mut cut = random.usize(..text.len());
            while !text.is_char_boundary(cut) {
                cut -= 1;
            }
            assert!(members(&text[..cut]).is_err(), "{}", &text[..cut]);
        }
    }
}
