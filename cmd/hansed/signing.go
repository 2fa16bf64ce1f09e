package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity/ca"
)

// Keys of what a replica whose own root is not acknowledged yet asks the others to sign. They go through etcd, since before it has an SVID
// it can prove itself to nobody; whoever writes there is this cluster's control plane anyway. No private key does.
const (
	asksPath    = "signing/asks/"    // + replica's ID / random
	answersPath = "signing/answers/" // the same
	askTime     = time.Minute        // after which an ask is forgotten
)

type ask struct {
	ID       string        `json:"id"`
	Key      []byte        `json:"key,omitempty"` // PKIX; of an X509-SVID
	DNSNames []string      `json:"dnsNames,omitempty"`
	Audience []string      `json:"audience,omitempty"` // of a JWT-SVID
	TTL      time.Duration `json:"ttl"`
	At       time.Time     `json:"at"`
}

type askAnswer struct {
	Chain   [][]byte  `json:"chain,omitempty"`
	Token   string    `json:"token,omitempty"`
	Issued  time.Time `json:"issued,omitzero"`
	Expires time.Time `json:"expires,omitzero"`
	Error   string    `json:"error,omitempty"`
}

// Signing implements ca.Peers.
func (r *roots) Signing() bool {
	b, ok := r.bundles.Get(r.td)
	return ok && r.othersSign(b, r.replicas.here())
}

// SignX509 implements ca.Peers.
func (r *roots) SignX509(ctx context.Context, p ca.X509Params) ([]*x509.Certificate, error) {
	key, err := x509.MarshalPKIXPublicKey(p.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	got, err := r.ask(ctx, ask{ID: p.ID.String(), Key: key, DNSNames: p.DNSNames, TTL: p.TTL})
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	for _, der := range got.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: it answered without a certificate", ca.ErrNotActive)
	}
	return chain, nil
}

// SignJWT implements ca.Peers.
func (r *roots) SignJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (ca.JWTSVID, error) {
	got, err := r.ask(ctx, ask{ID: id.String(), Audience: audience, TTL: ttl})
	if err != nil {
		return ca.JWTSVID{}, err
	}
	return ca.JWTSVID{Token: got.Token, ID: id, IssuedAt: got.Issued, Expires: got.Expires}, nil
}

func (r *roots) ask(ctx context.Context, a ask) (*askAnswer, error) {
	if !r.Signing() {
		return nil, fmt.Errorf("%w: no other replica signs", ca.ErrNotActive)
	}
	nonce := make([]byte, 8)
	rand.Read(nonce)
	key := r.replicas.self.ID + "/" + hex.EncodeToString(nonce)
	a.At = r.now().UTC()
	value, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	kv := etcd.NewKV(r.store, "")
	rev, err := kv.Put(ctx, asksPath+key, value)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ca.ErrNotActive, err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := errors.Join(kv.Delete(ctx, asksPath+key), kv.Delete(ctx, answersPath+key)); err != nil {
			r.log.Debug("what was asked stays until it is swept", "err", err)
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := r.store.Watch(ctx, answersPath+key, rev)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ca.ErrNotActive, err)
	}
	for {
		resp, err := w.Recv()
		if err != nil {
			return nil, fmt.Errorf("%w: no other replica has signed: %w", ca.ErrNotActive, err)
		}
		for _, e := range resp.Events {
			var got askAnswer
			if e.Delete {
				continue
			}
			if err := json.Unmarshal(e.Value, &got); err != nil {
				return nil, fmt.Errorf("decode %s: %w", e.Key, err)
			}
			if got.Error != "" {
				return nil, fmt.Errorf("refused: %s", got.Error)
			}
			return &got, nil
		}
	}
}

// RunSigning signs what other replicas ask for, while this one signs, until ctx ends.
func (r *roots) RunSigning(ctx context.Context) error {
	kv := etcd.NewKV(r.store, "")
	done := map[string]bool{}
	for ctx.Err() == nil {
		err := kv.Watch(ctx, asksPath, func(all []etcd.KeyValue, _ int64) error {
			present := map[string]bool{}
			for _, a := range all {
				key := strings.TrimPrefix(a.Key, asksPath)
				present[key] = true
				if done[key] || strings.HasPrefix(key, r.replicas.self.ID+"/") || !r.authority.Signs() {
					continue
				}
				done[key] = true
				if err := r.answer(ctx, kv, key, a.Value); err != nil {
					return err
				}
			}
			for key := range done {
				if !present[key] {
					delete(done, key)
				}
			}
			return nil
		})
		if ctx.Err() == nil {
			etcd.Again(ctx, r.log, "what replicas ask to be signed is read again", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

func (r *roots) answer(ctx context.Context, kv *etcd.KV, key string, value []byte) error {
	var a ask
	if err := json.Unmarshal(value, &a); err != nil || r.now().Sub(a.At).Abs() > askTime {
		if err := kv.Delete(ctx, asksPath+key); err != nil { // its asker has died
			return err
		}
		return kv.Delete(ctx, answersPath+key)
	}
	got, err := r.sign(ctx, a)
	if err != nil {
		got = &askAnswer{Error: err.Error()}
	}
	b, err := json.Marshal(got)
	if err != nil {
		return err
	}
	if _, err := kv.PutIfAbsent(ctx, answersPath+key, b); err != nil {
		return fmt.Errorf("answer %s: %w", key, err)
	}
	r.log.Info("signed for another replica", "replica", key[:strings.IndexByte(key, '/')], "id", a.ID, "error", got.Error)
	return nil
}

func (r *roots) sign(ctx context.Context, a ask) (*askAnswer, error) {
	id, err := spiffeid.FromString(a.ID)
	if err != nil {
		return nil, err
	}
	if len(a.Audience) > 0 {
		j, err := r.authority.SignJWT(ctx, id, a.Audience, a.TTL)
		return &askAnswer{Token: j.Token, Issued: j.IssuedAt, Expires: j.Expires}, err
	}
	key, err := x509.ParsePKIXPublicKey(a.Key)
	if err != nil {
		return nil, err
	}
	chain, err := r.authority.SignX509(ctx, ca.X509Params{ID: id, PublicKey: key, TTL: a.TTL, DNSNames: a.DNSNames})
	if err != nil {
		return nil, err
	}
	out := &askAnswer{}
	for _, c := range chain {
		out.Chain = append(out.Chain, c.Raw)
	}
	return out, nil
}
