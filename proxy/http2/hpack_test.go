package http2

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
)

func TestStaticTable(t *testing.T) {
	for _, c := range []struct {
		name  string
		index uint64
	}{{":authority", 1}, {":method", 2}, {":path", 4}, {":scheme", 6}, {":status", 8}, {"accept-charset", 15}, {"accept-encoding", 16}, {"content-length", 28}, {"cookie", 32}, {"user-agent", 58}, {"www-authenticate", 61}} {
		if index, _ := staticName(c.name); index != c.index {
			t.Errorf("%s: %d, want %d", c.name, index, c.index)
		}
	}
}

// reader is what the peer makes of blocks.
type blockReader struct {
	dec *hpack.Decoder
	got []hpack.HeaderField
}

func newBlockReader() *blockReader {
	r := &blockReader{}
	r.dec = hpack.NewDecoder(defaultTableSize, func(f hpack.HeaderField) { r.got = append(r.got, f) })
	return r
}

func (r *blockReader) read(t *testing.T, block []byte) []hpack.HeaderField {
	t.Helper()
	r.got = nil
	if _, err := r.dec.Write(block); err != nil {
		t.Fatalf("%x: %v", block, err)
	}
	if err := r.dec.Close(); err != nil {
		t.Fatalf("%x: %v", block, err)
	}
	return r.got
}

func TestRepeatedHeadsShrink(t *testing.T) {
	var e encoder
	e.init()
	r := newBlockReader()
	var sizes []int
	for i := range 4 {
		e.begin()
		e.field(":method", "GET")
		e.field(":scheme", "https")
		e.field(":path", "/orders")
		e.field(":authority", "payments.shop:8080")
		e.field("authorization", "Bearer secret")
		e.field("x-request-id", fmt.Sprint("id-", i))
		e.number(indexLength, 1234)
		sizes = append(sizes, len(e.b))
		got := r.read(t, e.b)
		if len(got) != 7 || got[3].Value != "payments.shop:8080" || got[5] != (hpack.HeaderField{Name: "x-request-id", Value: fmt.Sprint("id-", i)}) ||
			!got[4].Sensitive || got[5].Sensitive || got[6].Value != "1234" {
			t.Fatalf("%d: %v", i, got)
		}
	}
	if sizes[2] != sizes[3] || sizes[3] > 45 {
		t.Error(sizes)
	}
	if e.names["authorization"].entry != 0 {
		t.Error("a secret is in the table")
	}
}

// TestEncoderAgainstDecoder has x/net's decoder read what any sequence of heads and table sizes gives.
func TestEncoderAgainstDecoder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var e encoder
	e.init()
	r := newBlockReader()
	names := []string{":path", ":authority", "cookie", "user-agent", "accept-encoding", "set-cookie", "age"}
	for i := range 300 {
		names = append(names, fmt.Sprint("x-", i))
	}
	for round := range 20_000 {
		switch rnd.IntN(200) {
		case 0:
			for range 1 + rnd.IntN(3) { // several before one block
				e.resize(uint32(rnd.IntN(6000)))
			}
		case 1:
			e.resize(0)
			e.resize(defaultTableSize)
		}
		e.begin()
		var want []hpack.HeaderField
		for range rnd.IntN(12) {
			f := hpack.HeaderField{Name: names[rnd.IntN(min(len(names), 5+round/10))], Value: strings.Repeat("v", []int{0, 1, 5, 40, 126, 127, 128, 1100}[rnd.IntN(8)])}
			if rnd.IntN(2) == 0 {
				f.Value += fmt.Sprint(rnd.IntN(3))
			}
			f.Sensitive = f.Name == "cookie" || f.Name == "set-cookie"
			want = append(want, f)
			e.field(f.Name, f.Value)
		}
		if got := r.read(t, e.b); !slices.Equal(got, want) {
			t.Fatalf("round %d: %v, want %v", round, got, want)
		}
		if e.size > e.limit {
			t.Fatalf("table of %d, limit %d", e.size, e.limit)
		}
	}
	for _, status := range []int{200, 204, 304, 404, 503, 999} {
		e.begin()
		e.status(status)
		if got := r.read(t, e.b); len(got) != 1 || got[0].Name != ":status" || got[0].Value != fmt.Sprint(status) {
			t.Errorf("%d: %v", status, got)
		}
	}
}

func BenchmarkEncoder(b *testing.B) {
	var e encoder
	e.init()
	b.ReportAllocs()
	for i := range b.N {
		e.begin()
		e.field(":method", "GET")
		e.field(":scheme", "https")
		e.field(":path", "/orders")
		e.field(":authority", "payments.shop:8080")
		e.field("user-agent", "bench")
		e.field("accept", "*/*")
		e.field("x-id", []string{"a", "b"}[i%2])
		e.field("traceparent", []string{"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}[i%2])
		e.field("hanse-target", "payments.shop.svc.clusterset.local:8080")
	}
}
