package http1

import (
	"bytes"

	"github.com/hanse-mesh/hanse/proxy/message"
)

const (
	maxSizeDigits = 15 // hexadecimal: below 2^60
	maxExtension  = 256
)

// chunks decodes the chunked coding (RFC 9112 §7.1), strictly: sizes are plain hexadecimal, lines end in CRLF. Chunk extensions, of which
// nobody makes use but smugglers, are refused in requests and dropped from responses.
type chunks struct {
	request   bool
	maxHead   int
	maxFields int

	state    chunkState
	left     uint64
	done     bool
	trailers message.Fields
}

type chunkState uint8

const (
	sizeLine chunkState = iota
	chunkBytes
	chunkCRLF
	trailerLines
)

// next takes bytes off b: n of them, with data among them. n is 0 if b is too short to go on.
func (c *chunks) next(b []byte) (data []byte, n int, err *Reject) {
	switch c.state {
	case sizeLine:
		return c.size(b)
	case chunkBytes:
		n = int(min(uint64(len(b)), c.left))
		if c.left -= uint64(n); c.left == 0 {
			c.state = chunkCRLF
		}
		return b[:n], n, nil
	case chunkCRLF:
		if len(b) > 0 && b[0] != '\r' || len(b) > 1 && b[1] != '\n' {
			return nil, 0, bad("chunk_end")
		}
		if len(b) < 2 {
			return nil, 0, nil
		}
		c.state = sizeLine
		return nil, 2, nil
	}
	if len(b) >= 2 && b[0] == '\r' && b[1] == '\n' {
		c.done = true
		return nil, 2, nil
	}
	end := headEnd(b, 0)
	if end > c.maxHead || end == 0 && len(b) > c.maxHead {
		return nil, 0, &Reject{431, "trailers_too_large"}
	}
	if end == 0 {
		return nil, 0, nil
	}
	if c.trailers, err = parseTrailers(b[:end], c.maxFields); err != nil {
		return nil, 0, err
	}
	c.done = true
	return nil, end, nil
}

// size reads "1a2b\r\n".
func (c *chunks) size(b []byte) (data []byte, n int, err *Reject) {
	var size uint64
	i := 0
	for ; i < len(b); i++ {
		d := b[i]
		switch {
		case d >= '0' && d <= '9':
			d -= '0'
		case d >= 'a' && d <= 'f':
			d -= 'a' - 10
		case d >= 'A' && d <= 'F':
			d -= 'A' - 10
		default:
			goto end
		}
		if i == maxSizeDigits {
			return nil, 0, bad("chunk_size")
		}
		size = size<<4 | uint64(d)
	}
	return nil, 0, nil
end:
	if i == 0 {
		return nil, 0, bad("chunk_size")
	}
	if b[i] != '\r' {
		if c.request || b[i] != ';' && b[i] != ' ' && b[i] != '\t' {
			return nil, 0, bad("chunk_extension")
		}
		ext := bytes.IndexByte(b[i:], '\r')
		padding := b[i] != ';' // old servers fill the line up with spaces
		for _, x := range b[i:min(len(b), i+max(ext, 0))] {
			if badValueByte(x) || padding && x != ' ' && x != '\t' {
				return nil, 0, bad("chunk_extension")
			}
		}
		if ext > maxExtension || ext < 0 && len(b)-i > maxExtension {
			return nil, 0, bad("chunk_extension")
		}
		if ext < 0 {
			return nil, 0, nil
		}
		i += ext
	}
	if i+1 >= len(b) {
		return nil, 0, nil
	}
	if b[i+1] != '\n' {
		return nil, 0, bad("chunk_size")
	}
	c.state, c.left = chunkBytes, size
	if size == 0 {
		c.state = trailerLines
	}
	return nil, i + 2, nil
}

// body is the framing of what follows a head.
type body struct {
	kind   bodyKind
	left   int64 // fixed
	chunks chunks
}

type bodyKind uint8

const (
	none bodyKind = iota
	fixed
	chunked
	untilClose // also raw bytes
)

// over reports whether the body has been read.
func (b *body) over() bool {
	return b.kind == none || b.kind == fixed && b.left == 0 || b.kind == chunked && b.chunks.done
}
