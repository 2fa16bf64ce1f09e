package sidecar

import (
	"io"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"
)

// accessLog writes one JSON object a line. Lines wait for company for a moment; where the writer is stuck they are dropped and counted.
type accessLog struct {
	w       io.Writer
	dropped func()

	mu      sync.Mutex
	buf     []byte      // guarded by mu
	spare   []byte      // guarded by mu
	timer   *time.Timer // guarded by mu
	armed   bool        // guarded by mu
	writing bool        // guarded by mu
	lines   lines       // guarded by mu
}

// lines writes records as JSON. What is alike in one record and the next, which is most of it, is kept.
type lines struct {
	second       int64 // Unix: that date is of
	date, offset []byte
	ends         ends
	text         []byte // of ends
}

// ends are who speaks with whom.
type ends struct {
	reporter, protocol, source, peer, service, dest, endpoint, cluster, region, zone string
}

// Each write of a file wakes the scheduler's monitor, which then looks around every 20 µs for a while: few long ones are better than many.
const (
	logDelay = 100 * time.Millisecond
	logFlush = 256 << 10
	logLimit = 2 << 20
)

func newAccessLog(w io.Writer, dropped func()) *accessLog {
	if w == nil {
		return nil
	}
	return &accessLog{w: w, dropped: dropped}
}

// add appends a record.
func (l *accessLog) add(rec *record, now time.Time, took, head time.Duration) {
	l.mu.Lock()
	if len(l.buf) > logLimit {
		l.mu.Unlock()
		l.dropped()
		return
	}
	l.buf = l.lines.append(l.buf, rec, now, took, head)
	switch {
	case len(l.buf) >= logFlush && !l.writing:
		l.writing = true
		go l.write()
	case !l.armed:
		l.armed = true
		if l.timer == nil {
			l.timer = time.AfterFunc(logDelay, l.flush)
		} else {
			l.timer.Reset(logDelay)
		}
	}
	l.mu.Unlock()
}

// flush writes what waits, unless somebody does already.
func (l *accessLog) flush() {
	l.mu.Lock()
	l.armed = false
	if l.writing {
		l.mu.Unlock()
		return
	}
	l.writing = true
	l.mu.Unlock()
	l.write()
}

func (l *accessLog) write() {
	l.mu.Lock()
	for len(l.buf) > 0 {
		b := l.buf
		l.buf, l.spare = l.spare[:0], nil
		l.mu.Unlock()
		_, err := l.w.Write(b)
		if err != nil {
			l.dropped()
		}
		l.mu.Lock()
		if cap(b) <= 2*logFlush {
			l.spare = b[:0]
		}
	}
	l.writing = false
	l.mu.Unlock()
}

// stamp appends a time as RFC 3339 has it, in nanoseconds.
func (l *lines) stamp(b []byte, now time.Time) []byte {
	if s := now.Unix(); s != l.second || l.date == nil {
		l.second = s
		l.date = now.AppendFormat(l.date[:0], "2006-01-02T15:04:05.")
		l.offset = now.AppendFormat(l.offset[:0], "Z07:00")
	}
	b = append(b, l.date...)
	ns := now.Nanosecond()
	for unit := 100_000_000; unit > 0; unit /= 10 {
		b = append(b, byte('0'+ns/unit%10))
	}
	return append(b, l.offset...)
}

// append adds a record as one line; the keys are documented in docs/operations.md.
func (l *lines) append(b []byte, rec *record, now time.Time, took, head time.Duration) []byte {
	b = append(b, `{"time":"`...)
	b = l.stamp(b, now)
	b = append(b, `","level":"INFO","msg":"access"`...)
	if e := (ends{rec.reporter, rec.protocol, rec.source, rec.peer, rec.service, rec.dest, rec.endpoint, rec.cluster, rec.region, rec.zone}); e != l.ends || l.text == nil {
		t := appendString(l.text[:0], "reporter", e.reporter)
		t = appendString(t, "protocol", e.protocol)
		t = appendString(t, "source", e.source)
		t = appendString(t, "peer", e.peer)
		t = appendString(t, "service", e.service)
		t = appendString(t, "destination", e.dest)
		t = appendString(t, "endpoint", e.endpoint)
		t = appendString(t, "cluster", e.cluster)
		t = appendString(t, "region", e.region)
		t = appendString(t, "zone", e.zone)
		l.ends, l.text = e, t
	}
	b = append(b, l.text...)
	b = appendString(b, "method", rec.method)
	b = appendString(b, "path", rec.path)
	b = appendString(b, "route", rec.route)
	b = appendString(b, "policy", rec.policy)
	b = append(b, `,"status":`...)
	b = strconv.AppendInt(b, int64(rec.status), 10)
	b = appendString(b, "grpcStatus", rec.grpc)
	b = appendString(b, "error", rec.code)
	b = appendString(b, "detail", rec.detail)
	if rec.reporter == reporterSource {
		b = append(b, `,"localityLevel":`...)
		b = strconv.AppendInt(b, int64(rec.level), 10)
		b = append(b, `,"tries":`...)
		b = strconv.AppendInt(b, int64(rec.tries), 10)
	}
	b = append(b, `,"durationMs":`...)
	b = appendMillis(b, took)
	b = append(b, `,"headMs":`...)
	b = appendMillis(b, head)
	b = append(b, `,"bytesIn":`...)
	b = strconv.AppendInt(b, rec.in, 10)
	b = append(b, `,"bytesOut":`...)
	b = strconv.AppendInt(b, rec.out, 10)
	b = appendString(b, "traceId", rec.traceID)
	return append(b, "}\n"...)
}

// appendMillis is in thousandths.
func appendMillis(b []byte, d time.Duration) []byte {
	us := d.Microseconds()
	b = strconv.AppendInt(b, us/1000, 10)
	if frac := us % 1000; frac > 0 {
		b = append(b, '.', byte('0'+frac/100), byte('0'+frac/10%10), byte('0'+frac%10))
	}
	return b
}

// appendString leaves out what is empty. Callers choose some of these strings: nothing in them can end the value.
func appendString(b []byte, key, value string) []byte {
	if value == "" {
		return b
	}
	b = append(b, `,"`...)
	b = append(b, key...)
	b = append(b, `":"`...)
	plain := true
	for i := range len(value) {
		if c := value[i]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			plain = false
			break
		}
	}
	if plain {
		b = append(b, value...)
		return append(b, '"')
	}
	const hex = "0123456789abcdef"
	for _, r := range value { // what is not UTF-8 becomes U+FFFD
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r < ' ':
			b = append(b, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		default:
			b = utf8.AppendRune(b, r)
		}
	}
	return append(b, '"')
}
