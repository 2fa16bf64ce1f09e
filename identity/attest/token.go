package attest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
)

// Why a token is refused.
var (
	ErrUnknown  = errors.New("the agent token is not one of this trust domain's")
	ErrTampered = errors.New("the agent token is damaged: a character is wrong or missing")
	ErrUsed     = errors.New("the agent token was used already, by another agent")
	ErrExpired  = errors.New("the agent token has expired")
)

// Store keeps token records. A replica set shares it. Its methods are safe for concurrent use.
type Store interface {
	// Get returns the value of key, nil if there is none.
	Get(ctx context.Context, key string) ([]byte, error)
	// PutIfAbsent stores value and returns true, unless key is there already.
	PutIfAbsent(ctx context.Context, key string, value []byte) (bool, error)
	// CompareAndDelete removes key and returns true if its value is still value.
	CompareAndDelete(ctx context.Context, key string, value []byte) (bool, error)
	// List returns all keys that begin with prefix, and their values.
	List(ctx context.Context, prefix string) (map[string][]byte, error)
}

// Tokens makes and redeems agent tokens of one trust domain.
type Tokens struct {
	td    spiffeid.TrustDomain
	store Store
	now   func() time.Time
}

// New returns Tokens over store. now is the clock, by default time.Now.
func New(td spiffeid.TrustDomain, store Store, now func() time.Time) *Tokens {
	if now == nil {
		now = time.Now
	}
	return &Tokens{td: td, store: store, now: now}
}

// Grant is what a token entitles its agent to.
type Grant struct {
	// ID of the workload or of the gateway that the agent serves: its one entry. Zero for a plain SPIRE join token, whose
	// agent gets the entries that an administrator registers for it.
	ID spiffeid.ID
}

// Redemption is a redeemed token.
type Redemption struct {
	Grant
	AgentID spiffeid.ID // spiffe://<td>/spire/agent/join_token/<hash>
}

const (
	// DefaultTTL is the life of a token.
	DefaultTTL = 15 * time.Minute
	maxTTL     = 30 * 24 * time.Hour
	keep       = 24 * time.Hour // how long an expired token is still told from a wrong one
	prefix     = "hna1_"        // says what it is when it turns up somewhere
	secretLen  = 32
	sumLen     = 4
	minCustom  = 16 // characters of a token that somebody else thought up
	maxToken   = 512
)

type record struct {
	ID      string    `json:"id,omitempty"`
	Expires time.Time `json:"expires"`
}

// Create makes a token. ttl 0 is DefaultTTL. A Grant may name a workload (identity.WorkloadID) or the gateway
// (identity.GatewayID) of the trust domain, and nothing else.
func (t *Tokens) Create(ctx context.Context, g Grant, ttl time.Duration) (token string, expires time.Time, err error) {
	raw := make([]byte, secretLen, secretLen+sumLen)
	rand.Read(raw)
	sum := sha256.Sum256(raw)
	token = prefix + base64.RawURLEncoding.EncodeToString(append(raw, sum[:sumLen]...))
	expires, err = t.put(ctx, token, g, ttl)
	if err != nil {
		return "", time.Time{}, fmt.Errorf("create agent token: %w", err)
	}
	return token, expires, nil
}

// Register takes a token that the caller thought up, of at least 16 characters, for a SPIRE join token.
func (t *Tokens) Register(ctx context.Context, token string, g Grant, ttl time.Duration) (expires time.Time, err error) {
	if len(token) < minCustom || len(token) > maxToken || strings.HasPrefix(token, prefix) {
		return time.Time{}, fmt.Errorf("register join token: it must have %d to %d characters and not begin with %s", minCustom, maxToken, prefix)
	}
	expires, err = t.put(ctx, token, g, ttl)
	if err != nil {
		return time.Time{}, fmt.Errorf("register join token: %w", err)
	}
	return expires, nil
}

func (t *Tokens) put(ctx context.Context, token string, g Grant, ttl time.Duration) (time.Time, error) {
	if err := t.check(g); err != nil {
		return time.Time{}, err
	}
	if ttl <= 0 {
		ttl = DefaultTTL
	}
	if ttl > maxTTL {
		return time.Time{}, fmt.Errorf("a life of %s is more than %s", ttl, maxTTL)
	}
	r := record{Expires: t.now().Add(ttl).UTC().Truncate(time.Second)}
	if !g.ID.IsZero() {
		r.ID = g.ID.String()
	}
	value, err := json.Marshal(r)
	if err != nil {
		return time.Time{}, err
	}
	ok, err := t.store.PutIfAbsent(ctx, tokenKey(token), value)
	if err != nil {
		return time.Time{}, fmt.Errorf("store: %w", err)
	}
	if !ok {
		return time.Time{}, errors.New("it exists already")
	}
	return r.Expires, nil
}

func (t *Tokens) check(g Grant) error {
	if g.ID.IsZero() || g.ID == identity.GatewayID(t.td) {
		return nil
	}
	switch {
	case !g.ID.MemberOf(t.td):
		return fmt.Errorf("%s is not of trust domain %s", g.ID, t.td)
	case identity.Reserved(g.ID):
		return fmt.Errorf("%s is reserved", g.ID)
	case g.ID.Path() == "":
		return fmt.Errorf("%s names no workload", g.ID)
	}
	return nil
}

// Redeem uses a token for the agent whose public key has the hash keyHash. The same agent may repeat it until it expires,
// so that a lost answer costs no token; anyone else gets ErrUsed. Other errors: ErrUnknown, ErrTampered, ErrExpired.
func (t *Tokens) Redeem(ctx context.Context, token string, keyHash [32]byte) (Redemption, error) {
	if err := checkForm(token); err != nil {
		return Redemption{}, err
	}
	value, err := t.store.Get(ctx, tokenKey(token))
	if err != nil {
		return Redemption{}, fmt.Errorf("redeem agent token: store: %w", err)
	}
	if value == nil {
		return Redemption{}, ErrUnknown
	}
	var r record
	if err := json.Unmarshal(value, &r); err != nil {
		return Redemption{}, fmt.Errorf("redeem agent token: decode its record: %w", err)
	}
	used, err := t.store.Get(ctx, usedKey(token))
	if err != nil {
		return Redemption{}, fmt.Errorf("redeem agent token: store: %w", err)
	}
	if used != nil && subtle.ConstantTimeCompare(used, keyHash[:]) == 0 {
		return Redemption{}, ErrUsed
	}
	if now := t.now(); !now.Before(r.Expires) { // replicas' clocks may differ: say whose said so
		return Redemption{}, fmt.Errorf("%w, at %s; the server's clock says %s", ErrExpired, r.Expires.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	red := Redemption{AgentID: t.agentID(token)}
	if r.ID != "" {
		if red.ID, err = spiffeid.FromString(r.ID); err != nil {
			return Redemption{}, fmt.Errorf("redeem agent token: decode its record: %w", err)
		}
	}
	if used != nil {
		return red, nil
	}
	ok, err := t.store.PutIfAbsent(ctx, usedKey(token), keyHash[:])
	if err != nil {
		return Redemption{}, fmt.Errorf("redeem agent token: store: %w", err)
	}
	if !ok { // another agent was faster, or this one's first try was
		return t.Redeem(ctx, token, keyHash)
	}
	return red, nil
}

// Sweep forgets tokens that expired more than a day ago.
func (t *Tokens) Sweep(ctx context.Context) error {
	all, err := t.store.List(ctx, "agent-token/")
	if err != nil {
		return fmt.Errorf("sweep agent tokens: %w", err)
	}
	for key, value := range all {
		var r record
		if err := json.Unmarshal(value, &r); err != nil {
			return fmt.Errorf("sweep agent tokens: decode %s: %w", key, err)
		}
		if t.now().Before(r.Expires.Add(keep)) {
			continue
		}
		usedKey := "agent-token-used/" + strings.TrimPrefix(key, "agent-token/")
		used, err := t.store.Get(ctx, usedKey)
		if err == nil && used != nil {
			_, err = t.store.CompareAndDelete(ctx, usedKey, used)
		}
		if err == nil {
			_, err = t.store.CompareAndDelete(ctx, key, value)
		}
		if err != nil {
			return fmt.Errorf("sweep agent tokens: %w", err)
		}
	}
	return nil
}

// checkForm finds a copying mistake in a token of ours without asking the store.
func checkForm(token string) error {
	rest, ok := strings.CutPrefix(token, prefix)
	if !ok {
		if len(token) > maxToken || token == "" {
			return ErrUnknown
		}
		return nil
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if err != nil || len(raw) != secretLen+sumLen {
		return ErrTampered
	}
	sum := sha256.Sum256(raw[:secretLen])
	if subtle.ConstantTimeCompare(sum[:sumLen], raw[secretLen:]) == 0 {
		return ErrTampered
	}
	return nil
}

func tokenKey(token string) string { return "agent-token/" + hash("token", token) }
func usedKey(token string) string  { return "agent-token-used/" + hash("token", token) }

func (t *Tokens) agentID(token string) spiffeid.ID {
	return spiffeid.RequireFromSegments(t.td, "spire", "agent", "join_token", hash("agent", token)[:32])
}

// hash is one-way; purposes keep the agent's ID from telling the key in the store.
func hash(purpose, token string) string {
	sum := sha256.Sum256([]byte("hanse agent token\x00" + purpose + "\x00" + token))
	return hex.EncodeToString(sum[:])
}
