//! Dates as Python's `datetime.strftime` writes them.

use std::time::SystemTime;

/// `datetime.strftime(format)` of a moment in UTC, in the C locale. As in glibc, `-` after the `%`
/// drops the padding and an unknown directive stands for itself.
pub(super) fn strftime(format: &str, moment: SystemTime) -> String {
    let now = Utc::from(moment);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = chars.next();
        }
        match directive.and_then(|directive| now.directive(directive, unpadded)) {
            Some(text) => out.push_str(&text),
            None => {
                out.push('%');
                out.extend(unpadded.then_some('-'));
                out.extend(directive);
            }
        }
    }
    out
}

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A moment as the calendar and the clock show it.
struct Utc {
    year: i64,
    /// From 0.
    month: usize,
    /// From 1.
    day: i64,
    /// From 0, the first of January.
    day_of_year: i64,
    /// From 0, Sunday.
    weekday: usize,
    /// Since midnight.
    seconds: i64,
    microseconds: u32,
}

impl From<SystemTime> for Utc {
    fn from(moment: SystemTime) -> Self {
        let since_epoch = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let total = i64::try_from(since_epoch.as_secs()).unwrap_or(0);
        let mut days = total / 86_400;
        let weekday = ((days + 4) % 7) as usize; // 1970-01-01 was a Thursday.
        let mut year = 1970;
        while days >= days_in_year(year) {
            days -= days_in_year(year);
            year += 1;
        }
        let (day_of_year, mut month) = (days, 0);
        while days >= days_in_month(year, month) {
            days -= days_in_month(year, month);
            month += 1;
        }
        Self {
            year,
            month,
            day: days + 1,
            day_of_year,
            weekday,
            seconds: total % 86_400,
            microseconds: since_epoch.subsec_micros(),
        }
    }
}

impl Utc {
    /// The text of one directive; `None` if there is no such directive.
    fn directive(&self, directive: char, unpadded: bool) -> Option<String> {
        let number = |value: i64, width: usize| match unpadded {
            true => value.to_string(),
            false => format!("{value:0width$}"),
        };
        let hour = self.seconds / 3600;
        Some(match directive {
            'a' => DAYS[self.weekday][..3].to_owned(),
            'A' => DAYS[self.weekday].to_owned(),
            'b' | 'h' => MONTHS[self.month][..3].to_owned(),
            'B' => MONTHS[self.month].to_owned(),
            'd' => number(self.day, 2),
            'e' if unpadded => self.day.to_string(),
            'e' => format!("{:2}", self.day),
            'm' => number(self.month as i64 + 1, 2),
            'y' => number(self.year % 100, 2),
            'Y' => self.year.to_string(),
            'H' => number(hour, 2),
            'I' => number((hour + 11) % 12 + 1, 2),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'M' => number(self.seconds / 60 % 60, 2),
            'S' => number(self.seconds % 60, 2),
            'f' => format!("{:06}", self.microseconds),
            'j' => number(self.day_of_year + 1, 3),
            'w' => self.weekday.to_string(),
            'u' => ((self.weekday + 6) % 7 + 1).to_string(),
            'F' => self.all(&["%Y", "-", "%m", "-", "%d"]),
            'D' | 'x' => self.all(&["%m", "/", "%d", "/", "%y"]),
            'T' | 'X' => self.all(&["%H", ":", "%M", ":", "%S"]),
            'R' => self.all(&["%H", ":", "%M"]),
            'c' => self.all(&["%a", " ", "%b", " ", "%e", " ", "%T", " ", "%Y"]),
            // A datetime without a time zone writes nothing for these.
            'z' | 'Z' => String::new(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }

    fn all(&self, parts: &[&str]) -> String {
        let text = |part: &&str| match part.strip_prefix('%') {
            Some(name) => self.directive(name.chars().next()?, false),
            None => Some((*part).to_owned()),
        };
        parts.iter().filter_map(text).collect()
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in_year(year: i64) -> i64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: i64, month: usize) -> i64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn dates_match_python() {
        // datetime.fromtimestamp(t, timezone.utc).replace(tzinfo=None).strftime(...)
        let format =
            "%A %d %B %Y %H:%M:%S|%a %e %b %y %I %p %j %w %u|%-d/%-m|%F %T %D %R|%c|%Z%%%Q%";
        assert_eq!(
            strftime(format, at(951_782_400)),
            "Tuesday 29 February 2000 00:00:00|Tue 29 Feb 00 12 AM 060 2 2|29/2|2000-02-29 00:00:00 02/29/00 00:00|Tue Feb 29 00:00:00 2000|%%Q%"
        );
        assert_eq!(
            strftime(format, at(1_767_225_599)),
            "Wednesday 31 December 2025 23:59:59|Wed 31 Dec 25 11 PM 365 3 3|31/12|2025-12-31 23:59:59 12/31/25 23:59|Wed Dec 31 23:59:59 2025|%%Q%"
        );
        assert_eq!(strftime("%d %b %Y|%e|%-I", at(0)), "01 Jan 1970| 1|12");
    }
}
