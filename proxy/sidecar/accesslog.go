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
}

const (
	logDelay = 50 * time.Millisecond
	logFlush = 32 << 10
	logLimit = 1 << 20
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
	l.buf = rec.appendJSON(l.buf, now, took, head)
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
		if cap(b) <= 4*logFlush {
			l.spare = b[:0]
		}
	}
	l.writing = false
	l.mu.Unlock()
}

// appendJSON appends the record as one line; the keys are documented in docs/operations.md.
func (rec *record) appendJSON(b []byte, now time.Time, took, head time.Duration) []byte {
	b = append(b, `{"time":"`...)
	b = now.AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","level":"INFO","msg":"access"`...)
	b = appendString(b, "reporter", rec.reporter)
	b = appendString(b, "protocol", rec.protocol)
	b = appendString(b, "source", rec.source)
	b = appendString(b, "peer", rec.peer)
	b = appendString(b, "service", rec.service)
	b = appendString(b, "destination", rec.dest)
	b = appendString(b, "endpoint", rec.endpoint)
	b = appendString(b, "cluster", rec.cluster)
	b = appendString(b, "region", rec.region)
	b = appendString(b, "zone", rec.zone)
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
		b = append(b, `,"level":`...)
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
