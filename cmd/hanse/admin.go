package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

func (c *cli) adminCommand() *cobra.Command {
	group := &cobra.Command{
		Use:   "admin",
		Short: "Make administrators who reach hansed from afar",
		Long: `On its own machine hansed is administered through its Unix socket, whose permissions decide. From elsewhere it is mutual TLS with an
administrator's X509-SVID, if its configuration has remoteAdmin.listen.`,
	}
	var dir string
	var life time.Duration
	create := &cobra.Command{
		Use:   "create NAME --dir DIR",
		Short: "Make a key here and have it signed as spiffe://<trust domain>/hanse/admin/NAME",
		Long: `The private key is made by this command and goes nowhere else. DIR then holds svid.pem, key.pem and bundle.json, all with mode 0600, for a context of
the configuration file; the command prints one.`,
		Example: "  hanse admin create alice --dir ~/.config/hanse/west",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if dir == "" {
				return usage("hanse admin create alice --dir alice", "say where the files go")
			}
			public, private, err := newKey()
			if err != nil {
				return err
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			svid, err := b.IssueAdmin(cmd.Context(), admin.AdminRequest{Name: args[0], PublicKey: public, TTL: life.Seconds()})
			if err != nil {
				return err
			}
			if err := writeSVID(dir, svid.Chain, private, svid.Bundle); err != nil {
				return err
			}
			if c.structured() {
				return c.print(svid)
			}
			fmt.Fprintf(c.out, "%s, expires in %s. Its files are in %s.\n", svid.ID, age(time.Until(svid.Expires).Seconds()), dir)
			if svid.Address == "" {
				fmt.Fprintln(c.out, "\nRemote administration is off: give remoteAdmin.listen in hansed's configuration, and restart it.")
			}
			abs, err := filepath.Abs(dir)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.out, "\nA context for $HANSE_CONFIG or ~/.config/hanse/config.yaml:\n\n- name: %s\n  address: %s\n  svid: %s\n  key: %s\n  bundle: %s\n",
				args[0], dash(svid.Address), filepath.Join(abs, "svid.pem"), filepath.Join(abs, "key.pem"), filepath.Join(abs, "bundle.json"))
			return nil
		},
	}
	create.Flags().StringVar(&dir, "dir", "", "`DIR` for the files; made if it is missing")
	create.Flags().DurationVar(&life, "ttl", 12*time.Hour, "life of the SVID, at most 168h")
	must(create.MarkFlagDirname("dir"))
	group.AddCommand(create)
	return group
}

// newKey makes a key for an SVID: what is signed, as PKIX, and what stays, as PKCS#8.
func newKey() (public, private []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if public, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		return nil, nil, err
	}
	private, err = x509.MarshalPKCS8PrivateKey(key)
	return public, private, err
}

// writeSVID writes svid.pem, key.pem and bundle.json into a directory, which is made if it is missing.
func writeSVID(dir string, chain [][]byte, private, bundle []byte) error {
	var text []byte
	for _, der := range chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"svid.pem": text, "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), "bundle.json": bundle,
	} {
		if err := replace(filepath.Join(dir, name), content); err != nil {
			return err
		}
	}
	return nil
}

// replace writes a private file anew: never through what was there, and never readable for others.
func replace(path string, content []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Close())
}
