package join

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode"

	"github.com/hanse-mesh/hanse/federation"
)

// What can be wrong with a mesh token.
var (
	ErrTampered = errors.New("this is not a whole mesh token: characters are missing or changed")
	ErrWrong    = errors.New("the issuer does not know this mesh token")
	ErrUsed     = errors.New("this mesh token has been used by another cluster")
	ErrExpired  = errors.New("this mesh token has expired")
)

// TokenLife is how long a mesh token can be used.
const TokenLife = 15 * time.Minute

const (
	tokenPrefix = "hns1_"
	idSize      = 8
	secretSize  = 32
	pinSize     = sha256.Size
	sumSize     = 6
	maxPins     = 16
	maxAddrs    = 16
	maxToken    = 8 << 10 // characters
	maxMembers  = 4096    // in an answer
)

// Token is a mesh token. It is a secret: neither String nor LogValue shows more than its ID.
type Token struct {
	ID        [idSize]byte
	Secret    [secretSize]byte
	Expires   time.Time       // whole seconds
	Addresses []string        // of the issuer's federation listener
	Pins      [][pinSize]byte // SHA-256 of the SubjectPublicKeyInfo of each of the issuer's roots, prepared ones included
}

// NewToken makes a token with a random ID and secret.
func NewToken(expires time.Time, addresses []string, roots []*x509.Certificate) (*Token, error) {
	t := &Token{Expires: expires.Truncate(time.Second), Addresses: addresses}
	if len(addresses) == 0 || len(addresses) > maxAddrs {
		return nil, fmt.Errorf("a mesh token carries 1 to %d addresses, not %d", maxAddrs, len(addresses))
	}
	if len(roots) == 0 || len(roots) > maxPins {
		return nil, fmt.Errorf("a mesh token pins 1 to %d roots, not %d", maxPins, len(roots))
	}
	for _, a := range addresses {
		if err := federation.CheckAddress(a); err != nil {
			return nil, err
		}
	}
	for _, r := range roots {
		t.Pins = append(t.Pins, Pin(r))
	}
	if _, err := rand.Read(t.ID[:]); err != nil {
		return nil, err
	}
	if _, err := rand.Read(t.Secret[:]); err != nil {
		return nil, err
	}
	return t, nil
}

// Pin returns the SHA-256 of a certificate's SubjectPublicKeyInfo.
func Pin(c *x509.Certificate) [pinSize]byte { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// TokenID returns the ID as it names the token in stores and logs.
func (t *Token) TokenID() string { return hex.EncodeToString(t.ID[:]) }

// String names the token without its secret.
func (t *Token) String() string { return "mesh token " + t.TokenID() }

// LogValue names the token without its secret.
func (t *Token) LogValue() slog.Value { return slog.StringValue(t.TokenID()) }

// hash is what the issuer stores.
func hash(secret []byte) []byte {
	h := sha256.Sum256(secret)
	return h[:]
}

func sameHash(a, b []byte) bool { return subtle.ConstantTimeCompare(a, b) == 1 }

// Encode returns the token as people carry it: "hns1_" and base64url of a version-free layout (id, secret, expiry, pins, addresses), and
// of six bytes of its SHA-256, so that a damaged token is told from a wrong one.
func (t *Token) Encode() string {
	var b []byte
	b = append(b, t.ID[:]...)
	b = append(b, t.Secret[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Expires.Unix()))
	b = append(b, byte(len(t.Pins)))
	for _, p := range t.Pins {
		b = append(b, p[:]...)
	}
	b = append(b, byte(len(t.Addresses)))
	for _, a := range t.Addresses {
		b = binary.BigEndian.AppendUint16(b, uint16(len(a)))
		b = append(b, a...)
	}
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(b, checksum(b)...))
}

func checksum(b []byte) []byte {
	h := sha256.Sum256(append([]byte(tokenPrefix), b...))
	return h[:sumSize]
}

// DecodeToken reads a token as a person pasted it: white space is ignored. Every failure is ErrTampered.
func DecodeToken(s string) (*Token, error) {
	s = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return -1
		}
		return r
	}, s[:min(len(s), 2*maxToken)])
	tampered := func(what string) (*Token, error) { return nil, fmt.Errorf("%w (%s)", ErrTampered, what) }
	body, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		return tampered("it does not begin with " + tokenPrefix)
	}
	if len(s) > maxToken {
		return tampered("it is too long")
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil || len(b) < sumSize {
		return tampered("it does not decode")
	}
	b, sum := b[:len(b)-sumSize], b[len(b)-sumSize:]
	if string(checksum(b)) != string(sum) {
		return tampered("its checksum does not match")
	}
	t := &Token{}
	r := reader{b: b}
	copy(t.ID[:], r.take(idSize))
	copy(t.Secret[:], r.take(secretSize))
	seconds := r.number(8)
	pins := r.number(1)
	if pins == 0 || pins > maxPins {
		return tampered("it pins no roots or too many")
	}
	for range pins {
		var p [pinSize]byte
		copy(p[:], r.take(pinSize))
		t.Pins = append(t.Pins, p)
	}
	addrs := r.number(1)
	if addrs == 0 || addrs > maxAddrs {
		return tampered("it has no addresses or too many")
	}
	for range addrs {
		a := string(r.take(int(r.number(2))))
		if err := federation.CheckAddress(a); !r.short && err != nil {
			return tampered(err.Error())
		}
		t.Addresses = append(t.Addresses, a)
	}
	if r.short || len(r.b) != 0 || seconds > 1<<40 {
		return tampered("its length is wrong")
	}
	t.Expires = time.Unix(int64(seconds), 0).UTC()
	return t, nil
}

// reader takes bytes from the front and remembers if there were too few.
type reader struct {
	b     []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.short = true
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) number(n int) uint64 {
	var v uint64
	for _, b := range r.take(n) {
		v = v<<8 | uint64(b)
	}
	return v
}
