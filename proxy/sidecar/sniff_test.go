package sidecar

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRecognise(t *testing.T) {
	for in, want := range map[string]spoken{
		"":                                     undecided,
		"G":                                    undecided,
		"GET":                                  undecided,
		"GET ":                                 undecided,
		"GET / HTTP/1.1":                       undecided,
		"GET / HTTP/1.1\r\n":                   speaksHTTP,
		"GET / HTTP/1.0\nHost: x":              speaksHTTP,
		"M-SEARCH * HTTP/1.1\r\n":              speaksHTTP,
		"GET http://a/b HTTP/1.1\r\n":          speaksHTTP,
		"PRI":                                  undecided,
		h2Preface:                              speaksHTTP,
		h2Preface + "\x00\x00":                 speaksHTTP,
		"PRI * HTTP/2.0\r\n\r\nXX\r\n":         speaksOther,
		"EHLO mail.example\r\n":                speaksOther,
		"GET key\r\n":                          speaksOther,
		"GET HTTP/1.1\r\n":                     speaksOther,
		"*1\r\n$4\r\nPING\r\n":                 speaksOther,
		"\x16\x03\x01\x02\x00\x01":             speaksOther,
		"\x00\x00\x00\x08\x04\xd2":             speaksOther,
		"get / HTTP/1.1\r\n":                   speaksOther,
		" GET / HTTP/1.1\r\n":                  speaksOther,
		"GET /\x00 HTTP/1.1\r\n":               speaksOther,
		"SSH-2.0-OpenSSH_9.2\r\n":              speaksOther,
		"AVERYLONGWORDOFMORETHANTWENTYLETTERS": speaksOther,
		"GET /" + strings.Repeat("x", maxSniffed): speaksOther,
	} {
		if got := recognise([]byte(in)); got != want {
			t.Errorf("%.40q: %d, want %d", in, got, want)
		}
		for i := range min(len(in), 100) { // no beginning of it says otherwise
			if got := recognise([]byte(in[:i])); got != undecided && got != want {
				t.Errorf("%.40q: %d, but its first %d bytes %d", in, want, i, got)
			}
		}
	}
}

// FuzzRecognise: what is decided stays decided however the bytes come, and what net/http reads as a request is HTTP.
func FuzzRecognise(f *testing.F) {
	for _, s := range []string{"GET / HTTP/1.1\r\nHost: a\r\n\r\n", h2Preface, "EHLO x\r\n", "\x16\x03\x01", "GET key\r\n", ""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		all := recognise(b)
		for i := range min(len(b), 300) {
			if part := recognise(b[:i]); part != undecided && all != part {
				t.Fatalf("%q: %d, its first %d bytes %d", b, all, i, part)
			}
		}
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
		if err == nil && r.ProtoMajor == 1 && all != speaksHTTP && ordinary(r.Method) && len(b) < maxSniffed && b[0] > ' ' {
			t.Fatalf("%q is a request, and read as %d", b, all)
		}
	})
}

// ordinary are methods as this package takes them for such.
func ordinary(method string) bool {
	return len(method) <= longestVerb && strings.Trim(method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-") == ""
}

func TestSniff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tc := range []struct {
			parts []string
			want  spoken
			took  time.Duration
		}{
			{[]string{"GET / HT", "TP/1.1\r\n", "\r\n"}, speaksHTTP, 20 * time.Millisecond},
			{[]string{"EHLO x\r\n"}, speaksOther, 10 * time.Millisecond},
			{nil, undecided, 100 * time.Millisecond}, // waits for the server
			{[]string{"GET"}, undecided, 100 * time.Millisecond},
			{[]string{"GET /" + strings.Repeat("x", 3000), " HTTP/1.1\r\n"}, speaksHTTP, 20 * time.Millisecond},
		} {
			client, server := net.Pipe()
			go func() {
				for _, p := range tc.parts {
					time.Sleep(10 * time.Millisecond)
					_, _ = io.WriteString(client, p)
				}
				time.Sleep(time.Second)
				_ = client.Close()
			}()
			start := time.Now()
			nc, got := sniff(server, 100*time.Millisecond)
			if took := time.Since(start); got != tc.want || took != tc.took {
				t.Errorf("%.30q: %d after %s, want %d after %s", tc.parts, got, took, tc.want, tc.took)
			}
			if b, err := io.ReadAll(nc); err != nil || string(b) != strings.Join(tc.parts, "") {
				t.Errorf("%.30q: read as %.30q, %v", tc.parts, b, err)
			}
		}
	})
}
